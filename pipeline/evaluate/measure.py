"""The measurements of a recipe on held-out data: zero-shot, classifier accuracy, retrieval.

An entry's ``clips`` is the number of windows of a row, evenly spaced over its canonical clip: over the ``max_frames``
frames that the data set keeps of a video, however long the file is. Their logits are averaged, and for retrieval their
embeddings before these are normalised and ranked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pipeline.data import prompts
from pipeline.data.captions import usable_captions
from pipeline.data.media.errors import Reject
from pipeline.data.plan import group_arrays
from pipeline.data.sample_tokens import View, evaluation_tokens
from pipeline.data.sources import MediaSource
from pipeline.data.spec import TaskSpec, Variant
from pipeline.data.tokenizer import encode_text
from pipeline.errors import RequestError
from pipeline.evaluate.inputs import variants_of
from pipeline.evaluate.metrics import classification, retrieval
from pipeline.evaluate.trained_model import TrainedModel
from pipeline.export.features import class_anchors, mean_over_clips, pooled, unit
from pipeline.recipe import EvaluationSettings, specs

# (metrics, chance, number of examples).
Measured = tuple[dict[str, float], dict[str, float], int]


@dataclasses.dataclass
class HeldOut:
    """The features of one held-out manifest.

    features: (rows, clips, width) float32. rejected: the number of rows with bad media, left out of every metric.
    """

    features: np.ndarray
    labels: list[tuple[str, ...]]
    texts: list[tuple[str, ...]]
    rejected: int
    variant: Variant


def evaluate_run(run_dir: Path, model: TrainedModel | None = None) -> list[dict]:
    """[{dataset, task, metrics, chance, num_examples, ...}] for every entry of the recipe's ``evaluate`` list."""
    model = model or TrainedModel(run_dir)
    measure = {"zero_shot": _zero_shot, "classify": _classify, "retrieval": _retrieval}
    cache: dict = {}
    return [_entry(model, settings, measure[settings.kind], cache) for settings in default_list(model)]


def default_list(model: TrainedModel) -> list[EvaluationSettings]:
    """The recipe's list; without one, every measurement that its tasks allow on the data sets with a held-out part."""
    if model.recipe.evaluate:
        return model.recipe.evaluate
    out = {}
    for task in model.tasks.values():
        if not model.data_sets[task.data_set].held_out or len(task.media) != 1:
            continue
        for kind in _default_kinds(task):
            entry = EvaluationSettings(
                data_set=task.data_set, kind=kind, modality=task.media[0], classes=list(task.classes)
            )
            if specs.serves(task, entry):
                out[repr(entry)] = entry
    return list(out.values())


def _default_kinds(task: TaskSpec) -> list[str]:
    """The kinds that a task of one medium allows. With sigmoid a row has several labels, and no accuracy."""
    kinds = ["classify"] if "softmax" in dict(task.objectives) else []
    if task.contrasts:
        kinds.append("zero_shot" if task.text == "labels" else "retrieval")
    return kinds


def _entry(model: TrainedModel, settings: EvaluationSettings, measure: Callable[..., Measured], cache: dict) -> dict:
    manifests = model.data_sets[settings.data_set].held_out
    name = settings.held_out or next(iter(manifests))
    task = _task_for(model, settings)
    key = (settings.data_set, name, settings.modality, settings.clips, _variant_for(model, settings))
    if key not in cache:
        cache[key] = _held_out(model, settings, manifests[name], task)
    held_out: HeldOut = cache[key]
    metrics, chance, count = measure(model, settings, task, held_out)
    fewer = () if settings.kind == "classify" else model.fewer_dims
    by_dim = {str(dim): measure(model.at_dim(dim), settings, task, held_out)[0] for dim in fewer}
    label = settings.data_set if len(manifests) == 1 else f"{settings.data_set}/{name}"
    return {
        "dataset": label,
        "task": f"{settings.kind}_{settings.name or settings.modality}",
        "modality": settings.modality,
        "metrics": metrics,
        "chance": chance,
        "num_examples": count,
        "num_rejected": held_out.rejected,
        "step": model.step,
        "input": held_out.variant.name,
        "clips": settings.clips,
        "routing_group": "sample",
    } | ({"by_dim": by_dim} if by_dim else {})


def _task_for(model: TrainedModel, settings: EvaluationSettings) -> TaskSpec:
    """A trained task with the heads that this measurement needs."""
    for task in model.tasks.values():
        if specs.serves(task, settings):
            return task
    raise RequestError(
        f"evaluate: {settings.kind} of {settings.modality} on {settings.data_set} needs a task there with "
        f"{'a classifier' if settings.kind == 'classify' else 'text'}; the recipe has none"
    )


def _variant_for(model: TrainedModel, settings: EvaluationSettings) -> Variant:
    """The largest input that the tasks of this data set and kind trained on, nothing dropped (the paper's rule)."""
    classified = settings.kind == "classify"
    return variants_of(
        model.tasks.values(), data_set=settings.data_set, modality=settings.modality, classified=classified
    )[0]


def _held_out(model: TrainedModel, settings: EvaluationSettings, manifest: str, task: TaskSpec) -> HeldOut:
    data_set = model.data_sets[settings.data_set]
    source = MediaSource(
        data_set,
        modalities=(settings.modality,),
        manifest=manifest,
        limits=specs.decode_limits(model.recipe),
    )
    variant = _variant_for(model, settings)
    labels, texts = [], []
    embedder, tokenizer = task.embedder(settings.modality), model.tokenizer
    modality, decoding = data_set.modality(settings.modality), data_set.settings(settings.modality)

    def views() -> Iterator[dict]:
        for row in range(source.num_rows):
            try:
                # A row without labels or text is no reject: a sample is its media alone.
                clip = source.clip(row)
                windows = [View(variant, window=(i, settings.clips)) for i in range(settings.clips)]
                array = clip.media[settings.modality]
                samples = [evaluation_tokens(array, modality, decoding, view, model.tokens) for view in windows]
            except Reject:
                continue
            labels.append(clip.labels)
            limit = task.max_characters
            texts.append(usable_captions(clip.text, tokenizer, max_characters=limit) if tokenizer else ())
            yield from samples

    features = pooled(model, embedder, views())
    if not labels:
        raise RequestError(f"evaluate: none of the {source.num_rows} rows of {manifest} could be read")
    features = features.reshape(len(labels), settings.clips, -1)
    return HeldOut(features, labels, texts, source.num_rows - len(labels), variant)


def _classes(model: TrainedModel, settings: EvaluationSettings) -> list[str]:
    return settings.classes or list(model.data_sets[settings.data_set].classes)


def _label_indices(classes: list[str], labels: list[tuple[str, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """(rows with one of the classes, index of the class). A row with several counts as its first."""
    found = [next((classes.index(name) for name in row if name in classes), -1) for row in labels]
    found = np.asarray(found)
    rows = np.flatnonzero(found >= 0)
    if not rows.size:
        raise RequestError(f"evaluate: no held-out row has one of the classes {classes[:5]}")
    return rows, found[rows]


def _classify(model: TrainedModel, settings: EvaluationSettings, task: TaskSpec, held_out: HeldOut) -> Measured:
    classes, order = _classes(model, settings), list(model.data_sets[settings.data_set].classes)
    rows, labels = _label_indices(classes, held_out.labels)
    logits = mean_over_clips(lambda x: model.logits(x, settings.data_set), held_out.features[rows])
    return classification(logits[:, [order.index(c) for c in classes]], labels), _chance(classes), len(rows)


def _zero_shot(model: TrainedModel, settings: EvaluationSettings, task: TaskSpec, held_out: HeldOut) -> Measured:
    """Mean over the prompts of a class before normalisation, then cosine with each clip, then mean over the clips."""
    classes = _classes(model, settings)
    rows, labels = _label_indices(classes, held_out.labels)
    templates = settings.prompts or prompts.eval_templates(settings.modality)
    source = task.embedder(settings.modality)
    texts = [template.format(c) for c in classes for template in templates]
    projected = _project_texts(model, task, texts, target=source)
    anchors = class_anchors(projected, len(templates))

    def cosines(features: np.ndarray) -> np.ndarray:
        return unit(model.project(features, source=source, target="text")) @ anchors.T

    logits = mean_over_clips(cosines, held_out.features[rows])
    return classification(logits, labels), _chance(classes), len(rows)


def _retrieval(model: TrainedModel, settings: EvaluationSettings, task: TaskSpec, held_out: HeldOut) -> Measured:
    source = task.embedder(settings.modality)
    owner = np.repeat(np.arange(len(held_out.texts)), [len(t) for t in held_out.texts])
    texts = [t for row in held_out.texts for t in row]
    if not texts:
        raise RequestError(
            f"evaluate: no held-out row of {settings.data_set} has a usable text, so nothing to retrieve"
        )
    media = unit(mean_over_clips(lambda x: model.project(x, source=source, target="text"), held_out.features))
    metrics = retrieval(media, unit(_project_texts(model, task, texts, target=source)), owner)
    count = len(media)
    chance = {f"{side}_retrieval_recall@{k}": min(1.0, k / count) for side in ("image", "text") for k in (1, 5, 10)}
    return metrics, chance, count


def _project_texts(model: TrainedModel, task: TaskSpec, texts: list[str], *, target: str) -> np.ndarray:
    samples = [group_arrays(encode_text(model.tokenizer, text, task.text_length))["text"] for text in texts]
    return model.project(model.features("text", samples), source="text", target=target)


def _chance(classes: list[str]) -> dict[str, float]:
    return {"acc1": 1 / len(classes), "acc5": min(1.0, 5 / len(classes)), "mean_per_class_recall": 1 / len(classes)}


def print_table(results: list[dict]) -> None:
    """Prints the first metrics of each entry beside chance."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="held-out evaluation")
    for column in ("data set", "task", "metric", "value", "chance", "examples"):
        # Folded where the terminal is narrow: what is cut off may be what tells two metrics apart.
        right = column in ("value", "chance", "examples")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for r in results:
        shown = [m for m in ("acc1", "image_retrieval_recall@5", "text_retrieval_recall@5") if m in r["metrics"]]
        for metric in shown:
            chance = r["chance"].get(metric)
            beside = ("" if chance is None else f"{chance:.1%}", str(r["num_examples"]))
            for dim, values in [*r.get("by_dim", {}).items(), (None, r["metrics"])]:
                name = f"{metric}, {dim} dimensions" if dim else metric
                table.add_row(r["dataset"], r["task"], name, f"{values[metric]:.1%}", *beside)
    Console().print(table)
