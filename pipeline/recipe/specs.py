"""From a checked recipe to the plain dataclasses that the other rooms work with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from model import groups, terms
from model.config import NO_VOCABULARY, ModelConfig, OptimizerConfig, from_variant
from pipeline.cluster.settings import WorkerSettings
from pipeline.cluster.spec import Cluster, DecodeOptions
from pipeline.commands import command
from pipeline.data import spec
from pipeline.data.modalities import EMBEDDERS
from pipeline.data.variants import make_variant
from pipeline.errors import RequestError
from pipeline.recipe.added import added_specs, embedders, has_frames, patch_embedders
from pipeline.recipe.settings import Recipe
from pipeline.store.path import user_path
from pipeline.train.mixture.spec import SamplerSpec
from pipeline.train.telemetry import writers
from pipeline.train.telemetry.spec import LoggingSpec

# Frames of a video variant that names none.
_FRAMES = 16
# Keys of ``train`` that OptimizerConfig has under the same name.
_OPTIMIZER_KEYS = {"end_learning_rate", "clip_norm", "dense_update", "b1", "b2", "eps", "weight_decay"} | {
    "initial_learning_rate",
    "pre_warmup_learning_rate",
}

_T = TypeVar("_T")


# --- the model ---


def model_config(recipe: Recipe, *, vocab_size: int) -> ModelConfig:
    """Raises RequestError for a variant or a setting that cannot be."""
    settings = recipe.model.model_dump(exclude={"variant", "moe"}, exclude_none=True)
    settings["embedders"] = patch_embedders(recipe.modalities)
    moe = recipe.model.moe.model_dump(exclude_none=True)
    return _request(from_variant, recipe.model.variant, moe=moe, vocab_size=vocab_size, where="model", **settings)


def optimizer_config(recipe: Recipe) -> OptimizerConfig:
    train = recipe.train
    return OptimizerConfig(
        peak_learning_rate=train.learning_rate,
        warmup_steps=max(1, round(train.warmup_fraction * train.num_steps)),
        num_steps=train.num_steps,
        pre_warmup_steps=round(train.pre_warmup_fraction * train.num_steps),
        patch_scale=train.patch_learning_rate_scale,
        freeze=tuple(train.freeze),
        learning_rate_scales=tuple(sorted(train.learning_rate_scales.items())),
        **train.model_dump(include=_OPTIMIZER_KEYS),
    )


def task_groups(task: spec.TaskSpec, model: ModelConfig) -> tuple[str, ...]:
    """The parameter groups that a task trains."""
    modalities, left_out = [task.embedder(m) for m in task.modalities], {p for p, w in task.pair_weights if w == 0}
    pairs = [p for p in terms.pairs(modalities) if terms.pair_name(p) in set(task.pairs) - left_out]
    offsets = pairs if "sigmoid_pairs" in dict(task.objectives) else []
    classifier = task.data_set if task.classifies else None
    return groups.task_groups(model, modalities=modalities, pairs=pairs, offsets=offsets, classifier=classifier)


# --- data ---


def token_spec(recipe: Recipe) -> spec.TokenSpec:
    """The patches and position tables of the recipe's model."""
    model = model_config(recipe, vocab_size=NO_VOCABULARY)
    return spec.TokenSpec(
        vision_patch=model.vision_patch, vision_positions=model.vision_positions, audio_positions=model.audio_positions
    )


def data_set_specs(recipe: Recipe) -> dict[str, spec.DataSetSpec]:
    patch = model_config(recipe, vocab_size=NO_VOCABULARY).audio_patch
    return {name: _data_set(recipe, name, audio_patch=patch) for name in recipe.data_sets}


def _data_set(recipe: Recipe, name: str, *, audio_patch: tuple[int, int]) -> spec.DataSetSpec:
    s = recipe.data_sets[name]
    held_out = {"held_out": s.held_out} if isinstance(s.held_out, str) else s.held_out
    return spec.DataSetSpec(
        name=name,
        manifest=locate(s.manifest),
        held_out={k: locate(v) for k, v in held_out.items()},
        shards=s.shards and locate(s.shards),
        classes=tuple(s.classes),
        image=s.image,
        video=s.video,
        audio=spec.AudioSpec(**vars(s.audio), patch=audio_patch),
        max_reject_fraction=s.max_reject_fraction,
        schemes=tuple(s.schemes),
        added=added_specs(recipe.modalities, s.media, data_set=name),
    )


def task_specs(recipe: Recipe) -> dict[str, spec.TaskSpec]:
    tokens = token_spec(recipe)
    return {name: _task(recipe, name, tokens) for name in recipe.tasks}


def _task(recipe: Recipe, name: str, tokens: spec.TokenSpec) -> spec.TaskSpec:
    task, known = recipe.tasks[name], embedders(recipe.modalities)
    kept = {"data_set", "weight", "text", "text_length", "positives", "microbatches"}
    return spec.TaskSpec(
        name=name,
        **loss_fields(task.objectives, task.modalities, known),
        embedders=tuple((m, known[m]) for m in task.modalities if m in recipe.modalities),
        classes=tuple(task.classes),
        max_characters=recipe.text.max_characters,
        augment=task.augment,
        pair_weights=tuple(sorted(task.pair_weights.items())),
        variants=_variants(recipe, name, tokens),
        **task.model_dump(include=kept),
    )


def loss_fields(
    objectives: tuple[tuple[str, float], ...], modalities: Sequence[str], embedders: Mapping[str, str] = EMBEDDERS
) -> dict[str, Any]:
    """The fields of a TaskSpec that follow from the terms of its loss and its modalities.

    embedders: modality → the model's name for its layers.
    """
    names = [name for name, _ in objectives]
    pairs = terms.pairs(embedders[m] for m in modalities) if terms.contrastive(names) else ()
    return {
        "objectives": objectives,
        "modalities": tuple(modalities),
        "pairs": tuple(terms.pair_name(pair) for pair in pairs),
        "classified": terms.classified(modalities) if terms.classification(names) else None,
    }


def _variants(recipe: Recipe, name: str, tokens: spec.TokenSpec) -> tuple[spec.Variant, ...]:
    task = recipe.tasks[name]
    if not has_frames(recipe.modalities, task.modalities):
        return (spec.Variant(name="all", global_batch_size=task.batch_size),)
    if not task.variants:
        raise RequestError(f"tasks.{name}.variants: expected at least one {{size: ...}} for images or video")
    out: list[spec.Variant] = []
    for v in task.variants:
        variant = _request(
            make_variant,
            where=f"tasks.{name}.variants",
            num_frames=num_frames(v.frames) if "video" in task.modalities else 0,
            size=v.size,
            drop_rate=v.drop_rate,
            base=out[0] if out else None,
            batch_size=None if out else task.batch_size,
            spec=tokens,
        )
        out.append(variant)
    return tuple(out)


def num_frames(frames: int | None) -> int:
    """Frames of a video variant that may name none."""
    return frames or _FRAMES


# --- the run ---


def sampler_spec(recipe: Recipe) -> SamplerSpec:
    return SamplerSpec(**vars(recipe.sampler))


def decode_limits(recipe: Recipe) -> spec.DecodeLimits:
    cluster = recipe.cluster
    return spec.DecodeLimits(
        timeout_s=cluster.decode_timeout_s,
        # A file is asked for up to three times, and the run ends with its state saved before the watchdog ends it.
        storage_s=cluster.stall_timeout_s / 4,
        memory_bytes=cluster.decode_memory_mb << 20,
    )


def cluster_spec(recipe: Recipe) -> Cluster:
    settings = recipe.cluster
    workers = {field.name: getattr(settings, field.name) for field in dataclasses.fields(WorkerSettings)}
    return Cluster(
        **workers,
        decode=DecodeOptions(settings.decode, settings.block_steps, settings.decode_ahead, settings.decode_cpus),
        cache_bytes=settings.clip_cache_mb << 20,
        limits=decode_limits(recipe),
    )


def logging_spec(recipe: Recipe) -> LoggingSpec:
    settings, cluster = recipe.logging, recipe.cluster
    named = writers.default_writers() if settings.writers is None else tuple(dict.fromkeys(settings.writers))
    advice = {
        name: feed_advice(
            task.data_set,
            from_shards=recipe.data_sets[task.data_set].shards is not None,
            on_cluster=cluster.num_workers != 0 or cluster.address is not None,
            clip_cache_mb=cluster.clip_cache_mb,
        )
        for name, task in recipe.tasks.items()
    }
    train = recipe.train
    # Training knows the room above it by this name alone.
    changed = {
        "evaluator": "pipeline.evaluate.during:LiveEvaluation",
        "writers": named,
        "log_every": train.log_every,
        "log_samples": train.log_samples,
        "feed_advice": advice,
    }
    return LoggingSpec(**vars(settings) | changed)


def feed_advice(data_set: str, *, from_shards: bool, on_cluster: bool, clip_cache_mb: int) -> str:
    """Remedies for a task whose stream does not keep up, the most effective first."""
    options = [] if from_shards else [f"decode {data_set} once ({command('preprocess')}) and set its shards"]
    options.append("add decode CPUs to the cluster" if on_cluster else "use a machine or a cluster with more CPUs")
    if not from_shards:
        options.append(f"raise cluster.clip_cache_mb ({clip_cache_mb}) if the clips fit into memory")
    options.append("raise cluster.decode_ahead if CPUs are idle")
    return ", or ".join(options)


# --- places ---


def locate(uri: str) -> str:
    """An absolute path or URI; "demo:" paths lie in the demo corpus' cache folder."""
    if uri.startswith("demo:"):
        from pipeline.data import demo

        return str(demo.cache_dir() / uri.removeprefix("demo:"))
    return uri if "://" in uri else str(user_path(uri).absolute())


def uses_demo(recipe: Recipe) -> bool:
    return any(s.manifest.startswith("demo:") for s in recipe.data_sets.values())


def _request(function: Callable[..., _T], *args: object, where: str, **kwargs: object) -> _T:
    """Calls a function whose ValueError is the recipe's fault."""
    try:
        return function(*args, **kwargs)
    except ValueError as e:
        raise RequestError(f"{where}: {e}") from e
