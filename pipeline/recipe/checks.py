"""Checks of a recipe's parts against each other, before anything starts. All raise RequestError."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import re

import numpy as np

from model import groups, terms
from model.config import NO_VOCABULARY, ModelConfig, MoEConfig
from pipeline.data.augment import COLOUR_WORDS, LOUDNESS_WORDS
from pipeline.data.media.clip import BUILT_IN
from pipeline.data.media.decoders import find
from pipeline.data.modalities import TEXT
from pipeline.data.spec import MEDIA, AudioSpec, TaskSpec
from pipeline.errors import RequestError
from pipeline.recipe import specs
from pipeline.recipe.added import embedders, has_frames
from pipeline.recipe.measurable import missing_head
from pipeline.recipe.settings import DataSetSettings, EvaluationSettings, Recipe, TaskSettings
from pipeline.train.mixture.settings import SamplerSettings

# Words that are wrong in a mirrored picture.
_SIDES = re.compile(r"\b(left|right)(wards?)?\b", re.IGNORECASE)


def check_references(recipe: Recipe) -> None:
    """Checks names, classes, objectives, evaluations and the sampler."""
    for name, data_set in recipe.data_sets.items():
        twice = sorted(c for c, count in collections.Counter(data_set.classes).items() if count > 1)
        if twice:
            raise RequestError(f"data_sets.{name}.classes: {twice[:3]} appear more than once")
        _check_decoders(name, data_set)
        for modality in data_set.media:
            _known(modality, recipe.modalities, f"data_sets.{name}.media")
    for name, task in recipe.tasks.items():
        where = f"tasks.{name}"
        _known(task.data_set, recipe.data_sets, f"{where}.data_set")
        for number, modality in enumerate(task.modalities):
            _known(modality, embedders(recipe.modalities), f"{where}.modalities.{number}")
        _check_task(where, task, recipe)
    tasks = specs.task_specs(recipe)
    for task in tasks.values():
        _check_loss(f"tasks.{task.name}", task)
    for number, e in enumerate(recipe.evaluate):
        check_evaluation(f"evaluate.{number}", e, recipe)
    _check_sampler(recipe)
    _check_best(recipe)
    steps, cpus = recipe.logging.profile_steps, recipe.cluster.decode_cpus
    if steps and steps[0] > steps[1]:
        raise RequestError(f"logging.profile_steps: expected [first, last], ascending; found {list(steps)}")
    if cpus and cpus[0] > cpus[1]:
        raise RequestError(f"cluster.decode_cpus: expected [min, max], ascending; found {list(cpus)}")


def _check_best(recipe: Recipe) -> None:
    every = recipe.logging.evaluate_every
    if recipe.checkpoint.keep_best is None:
        return
    if every is None or recipe.train.checkpoint_every % every:
        raise RequestError(
            f"checkpoint.keep_best: expected a logging.evaluate_every that divides train.checkpoint_every, "
            f"{recipe.train.checkpoint_every}, so that every checkpoint is judged; found {every}"
        )


# Key of ``sampler`` → the only kind that reads it.
_OF_KIND = {"intervals": "round_robin", "period": "exact", "stages": "multinomial", "bandit": "bandit"}


_DEFAULT_SAMPLER = SamplerSettings()


def _check_sampler(recipe: Recipe) -> None:
    settings, spec = recipe.sampler, specs.sampler_spec(recipe)
    for key, kind in _OF_KIND.items():
        if getattr(settings, key) != getattr(_DEFAULT_SAMPLER, key) and settings.kind != kind:
            raise RequestError(f"sampler.{key}: only the kind {kind} uses it; found {settings.kind}")
    for name in settings.intervals:
        _known(name, recipe.tasks, "sampler.intervals")
    for number, stage in enumerate(settings.stages):
        where = f"sampler.stages.{number}"
        for name in stage.weights:
            _known(name, recipe.tasks, f"{where}.weights")
        if number and stage.from_step <= settings.stages[number - 1].from_step:
            raise RequestError(f"{where}.from_step: expected more than the stage before, found {stage.from_step}")
    running = spec.runs(recipe.tasks)
    if not running:
        raise RequestError("tasks: every weight is 0, so no task would ever run; give one a positive weight")
    # Weights change at stages alone, between two of them by a straight line: looking there is enough.
    for step in {0, *(stage.from_step for stage in settings.stages)}:
        weights = {name: 1.0 if task.weight is None else task.weight for name, task in recipe.tasks.items()}
        if not any(spec.weights_at(np.array([step]), weights)[0] > 0):
            raise RequestError(f"sampler.stages: at step {step} every weight is 0, so no task could run")
    floor = settings.bandit.floor * len(running)
    if settings.kind == "bandit" and floor > 1:
        raise RequestError(
            f"sampler.bandit.floor: {settings.bandit.floor:g} for each of {len(running)} tasks is more than all steps"
        )
    if settings.max_share is not None and settings.max_share * len(running) < 1:
        raise RequestError(
            f"sampler.max_share: {len(running)} tasks of at most {settings.max_share:g} do not fill all steps"
        )


def _check_decoders(name: str, data_set: DataSetSettings) -> None:
    for modality, built_in in BUILT_IN.items():
        try:
            find(getattr(data_set, modality).decoder, built_in=built_in)
        except ValueError as e:
            raise RequestError(f"data_sets.{name}.{modality}.decoder: {e}") from e


def check_model(recipe: Recipe) -> None:
    """Checks that the model can hold the texts, spectrograms and experts."""
    model = specs.model_config(recipe, vocab_size=NO_VOCABULARY)
    _check_experts(recipe, model.moe)
    _check_router(model.moe)
    _check_groups(recipe, model)
    for name, task in recipe.tasks.items():
        if "text" in task.modalities and task.text_length > model.text_positions[0]:
            raise RequestError(
                f"tasks.{name}.text_length: {task.text_length} tokens, but {recipe.model.variant} has "
                f"{model.text_positions[0]} text positions"
            )
    heard = {task.data_set for task in recipe.tasks.values() if "audio" in task.modalities}
    for name, data_set in specs.data_set_specs(recipe).items():
        if name in heard:
            _check_spectrogram(f"data_sets.{name}.audio", data_set.audio, model)


def _check_groups(recipe: Recipe, model: ModelConfig) -> None:
    """Checks that names of parameter groups mean some, and that every task has one to train."""
    of_tasks = {name: specs.task_groups(task, model) for name, task in specs.task_specs(recipe).items()}
    known = list(dict.fromkeys(group for of_task in of_tasks.values() for group in of_task))
    for key in ("freeze", "learning_rate_scales"):
        for name in getattr(recipe.train, key):
            if not any(groups.named(group, [name]) for group in known):
                raise RequestError(f"train.{key}: {name!r} means no group of parameters; known: {', '.join(known)}")
    for name, of_task in of_tasks.items():
        if recipe.tasks[name].weight != 0 and all(groups.named(group, recipe.train.freeze) for group in of_task):
            raise RequestError(f"train.freeze: tasks.{name} trains {', '.join(of_task)}, and all of them are frozen")


def _check_spectrogram(where: str, audio: AudioSpec, model: ModelConfig) -> None:
    for key, patch in zip(("num_frames", "num_mels"), model.audio_patch, strict=True):
        if getattr(audio, key) % patch:
            raise RequestError(f"{where}.{key}: must divide by the patch of {patch}")
    if any(n > rows for n, rows in zip(audio.grid, model.audio_positions, strict=True)):
        raise RequestError(
            f"{where}: a grid of {audio.grid} patches is larger than the position tables {model.audio_positions}; "
            "lower num_frames or num_mels"
        )


def _check_experts(recipe: Recipe, moe: MoEConfig | None) -> None:
    devices = recipe.cluster.expert_parallel
    num_experts = moe.num_experts if moe else 1
    if num_experts % devices:
        found = f"{num_experts} experts" if moe else "a dense model"
        raise RequestError(f"cluster.expert_parallel: {devices} devices cannot share {found} in equal parts")


def _check_router(moe: MoEConfig | None) -> None:
    if moe is None or moe.router == "tokens_choose":
        return
    for key in ("num_selected", "batch_priority"):
        if getattr(moe, key) != MoEConfig.__dataclass_fields__[key].default:
            raise RequestError(f"model.moe.{key}: only the router tokens_choose uses it; found {moe.router}")


def check_evaluation(where: str, e: EvaluationSettings, recipe: Recipe) -> None:
    """Checks that a measurement's rows and the heads that it needs exist."""
    for modality in {e.modality, e.other}:
        _known(
            modality, embedders(recipe.modalities), f"{where}.modality" if modality == e.modality else f"{where}.other"
        )
    if e.modality == TEXT:
        raise RequestError(f"{where}.modality: expected one that comes from files; text is the other, or a class")
    if e.data_set is not None:
        _known(e.data_set, recipe.data_sets, f"{where}.data_set")
        if e.kind == "classify":
            _subset(e.classes, recipe.data_sets[e.data_set].classes, f"{where}.classes", e.data_set)
    if e.manifest is None:
        _check_held_out(where, e, recipe)
    missing = missing_head(e, specs.task_specs(recipe).values(), embedders(recipe.modalities), heads=_heads(recipe))
    if missing:
        raise RequestError(f"{where}: {missing}")


def _heads(recipe: Recipe) -> str:
    return specs.model_config(recipe, vocab_size=NO_VOCABULARY).heads


def _check_held_out(where: str, e: EvaluationSettings, recipe: Recipe) -> None:
    if e.data_set is None:
        raise RequestError(f"{where}: expected data_set, for its held-out rows, or manifest; found neither")
    held_out = recipe.data_sets[e.data_set].held_out
    if not held_out:
        raise RequestError(f"{where}: data_sets.{e.data_set}.held_out is not set, so there is nothing to measure on")
    if e.held_out is not None and (isinstance(held_out, str) or e.held_out not in held_out):
        raise RequestError(f"{where}.held_out: {e.held_out!r} is not one of data_sets.{e.data_set}.held_out")


def _check_augment(where: str, task: TaskSettings, data_set: DataSetSettings, *, seen: bool) -> None:
    augment = task.augment
    for key, pair, low, high in (
        ("area", augment.area, 0, 1),
        ("aspect", augment.aspect, 0, None),
        ("sound.gain_db", augment.sound.gain_db, None, None),
        ("sound.noise_snr_db", augment.sound.noise_snr_db, None, None),
    ):
        _check_range(f"{where}.{key}", pair, above=low, limit=high)
    changed = [field.name for field in dataclasses.fields(augment) if getattr(augment, field.name) != field.default]
    heard = "audio" in task.modalities
    for key in changed:
        if not (heard if key == "sound" else seen):
            media = "sound" if key == "sound" else "images and video"
            raise RequestError(f"{where}.{key}: applies only to {media}; found modalities {task.modalities}")
    if augment.flip and "text" in task.modalities and task.text == "captions":
        raise RequestError(f"{where}.flip: captions may say left or right; leave it off, or use text: labels")
    # Captions that mention a change are found sample by sample.
    classes = task.classes or data_set.classes
    for key, on, words, wrong in (
        ("flip", augment.flip, _SIDES, "in the mirror"),
        ("colour", augment.colour.probability > 0, COLOUR_WORDS, "in other colours"),
        ("sound", augment.sound.changes_loudness, LOUDNESS_WORDS, "at another loudness"),
    ):
        wrong_class = next((c for c in classes if on and words.search(c)), None)
        if wrong_class is not None:
            raise RequestError(f"{where}.{key}: the class {wrong_class!r} would be wrong {wrong}; leave it off")


def _check_range(where: str, pair: tuple[float, float], *, above: float | None, limit: float | None) -> None:
    first, last = pair
    if not first <= last or (above is not None and first <= above) or (limit is not None and last > limit):
        bounds = [f"above {above}"] if above is not None else []
        bounds += [f"at most {limit}"] if limit is not None else []
        more = ", " + " and ".join(bounds) if bounds else ""
        raise RequestError(f"{where}: expected [low, high], rising{more}; found {[first, last]}")


def _check_task(where: str, task: TaskSettings, recipe: Recipe) -> None:
    modalities, data_set = task.modalities, recipe.data_sets[task.data_set]
    known = embedders(recipe.modalities)
    if len({known[m] for m in modalities}) != len(modalities):
        raise RequestError(
            f"{where}.modalities: expected different ones, and image or video, not both; found {modalities}"
        )
    _check_objective(where, task, data_set)
    if task.positives == "text" and "text" not in modalities:
        raise RequestError(f'{where}.positives: "text" needs text among the modalities, found {modalities}')
    if "video" not in modalities and any(v.frames for v in task.variants):
        raise RequestError(f"{where}.variants: only video has frames; found modalities {modalities}")
    if task.variants and not has_frames(recipe.modalities, modalities):
        raise RequestError(f"{where}.variants: only images and video have them; found modalities {modalities}")
    _check_augment(f"{where}.augment", task, data_set, seen=has_frames(recipe.modalities, modalities))
    _subset(task.classes, data_set.classes, f"{where}.classes", task.data_set)
    if "video" in modalities:
        frames = max((specs.num_frames(v.frames) for v in task.variants), default=0)
        if frames > data_set.video.max_frames:
            raise RequestError(
                f"{where}.variants: {frames} frames, but data_sets.{task.data_set}.video.max_frames is "
                f"{data_set.video.max_frames}; raise it"
            )


def _check_objective(where: str, task: TaskSettings, data_set: DataSetSettings) -> None:
    modalities, names = task.modalities, [name for name, _ in task.objectives]
    contrast = next(iter(terms.contrastive(names)), None)
    classify = next(iter(terms.classification(names)), None)
    if contrast and len(modalities) < 2:
        raise RequestError(f"{where}.modalities: {contrast} needs two or three, found {modalities}")
    if classify and not contrast and (len(modalities) != 1 or modalities == ["text"]):
        raise RequestError(f"{where}.modalities: {classify} needs one of {', '.join(MEDIA)}; found {modalities}")
    if classify and not data_set.classes:
        raise RequestError(f"{where}: {classify} needs data_sets.{task.data_set}.classes, found none")


def _check_loss(where: str, task: TaskSpec) -> None:
    """Checks pair weights and microbatches."""
    weights = dict(task.pair_weights)
    if set(weights) - set(task.pairs):
        found = ", ".join(task.pairs) or "none, since nothing is compared"
        raise RequestError(f"{where}.pair_weights: the task's pairs are {found}; found {sorted(weights)}")
    if task.pairs and not any(weights.get(pair, 1.0) for pair in task.pairs):
        raise RequestError(f"{where}.pair_weights: every pair has the weight 0, so nothing would be compared")
    if task.microbatches > 1 and task.contrasts:
        raise RequestError(
            f"{where}.microbatches: contrastive losses compare the whole batch; expected 1, found {task.microbatches}"
        )
    for variant in task.variants:
        if variant.global_batch_size % task.microbatches:
            raise RequestError(
                f"{where}.microbatches: {task.microbatches} do not divide the batch of {variant.global_batch_size} of "
                f"variant {variant.name}"
            )


def _known(name: str, known, where: str) -> None:
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(known)}"
        raise RequestError(f"{where}: unknown name {name!r}; {hint}")


def _subset(classes: list[str], of, where: str, data_set: str) -> None:
    known = set(of)
    unknown = [c for c in classes if c not in known]
    if unknown:
        raise RequestError(f"{where}: {unknown[:3]} are not among the {len(of)} classes of data_sets.{data_set}")
