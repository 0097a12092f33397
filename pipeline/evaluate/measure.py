"""The measurements of a recipe, or of a user's own, as entries of ``eval.json``.

``clips`` of an entry is the number of windows of a row, evenly spaced over its canonical clip: over the ``max_frames``
frames that the data set keeps of a video, however long the file is. Their logits are averaged, and for retrieval their
embeddings before these are normalised and ranked.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from model import terms
from pipeline.credentials import redacted
from pipeline.data.spec import TaskSpec
from pipeline.evaluate.evaluator import Evaluator
from pipeline.evaluate.kinds import KINDS, Result
from pipeline.evaluate.measurement import Measurement, measurements
from pipeline.evaluate.outcomes import AveragePrecision, MeanOfClasses, interval
from pipeline.evaluate.trained_model import EvaluatedModel, TrainedModel
from pipeline.recipe import EvaluationSettings
from pipeline.recipe.measurable import LEARNING

# The kinds that compare vectors of a common space.
_IN_THE_SPACE = ("zero_shot", "retrieval")


def evaluate_run(run_dir: Path, model: EvaluatedModel | None = None) -> list[dict]:
    """The entries of ``eval.json`` for every entry of the recipe's ``evaluate`` list."""
    model = model or TrainedModel(run_dir)
    return evaluate(Evaluator(model), default_list(model))


def evaluate(evaluator: Evaluator, entries: Iterable[EvaluationSettings]) -> list[dict]:
    """[{dataset, task, metrics, intervals, chance, num_examples, ...}], one a measurement and size.

    Raises RequestError for the first measurement that cannot be made, before any is.
    """
    found = [m for settings in entries for m in measurements(evaluator.model, settings)]
    return [_entry(evaluator, m) for m in found]


def _entry(evaluator: Evaluator, measurement: Measurement) -> dict:
    model, settings, side = evaluator.model, measurement.settings, measurement.side
    measure = KINDS[settings.kind]
    result = measure(evaluator, measurement)
    resamples = settings.resamples
    intervals = {name: interval(metric, resamples=resamples) for name, metric in result.metrics.items()}
    entry = {
        "dataset": measurement.label,
        "task": measurement.name,
        "kind": settings.kind,
        "modality": side.modality,
        "metrics": {name: metric.value() for name, metric in result.metrics.items()},
        "intervals": {name: found for name, found in intervals.items() if found},
        "chance": result.chance,
        "num_examples": result.num_examples,
        "num_rejected": result.num_rejected,
        "step": model.step,
        "input": side.variant.name,
        "clips": 1 if side.modality == "image" else settings.clips,
        "routing_group": "sample",
        "manifest": redacted(measurement.manifest),
        "prepared_as": side.data_set.name,
    }
    if settings.kind in _IN_THE_SPACE and model.fewer_dims:
        fewer = {dim: measure(evaluator.at_dim(dim), measurement) for dim in model.fewer_dims}
        entry["by_dim"] = {str(dim): {n: m.value() for n, m in of.metrics.items()} for dim, of in fewer.items()}
    entry |= {"baseline": result.baseline} if result.baseline else {}
    if settings.kind in LEARNING or settings.baseline:
        entry["fit"] = redacted(measurement.fit_manifest)
    entry |= {"other": settings.other} if settings.kind == "retrieval" else {}
    entry |= {"sample_of_rows": settings.max_rows} if settings.max_rows else {}
    return entry | result.facts | _of_classes(result)


def _of_classes(result: Result) -> dict:
    """The number of classes, and the metric of each."""
    if result.classes is None:
        return {}
    out = {"num_classes": len(result.classes)}
    for metric in result.metrics.values():
        if isinstance(metric, MeanOfClasses | AveragePrecision):
            name = "recall" if isinstance(metric, MeanOfClasses) else "average_precision"
            out["per_class"] = {name: {result.classes[c]: value for c, value in metric.of_classes().items()}}
    return out


def default_list(model: EvaluatedModel) -> list[EvaluationSettings]:
    """The recipe's list; without one, every measurement that its tasks allow on the data sets with a held-out part."""
    if model.recipe.evaluate:
        return model.recipe.evaluate
    out = {}
    for task in model.tasks.values():
        if model.data_sets[task.data_set].held_out and task.weight != 0:
            for entry in _default_entries(task):
                out[repr(entry)] = entry
    return list(out.values())


def _default_entries(task: TaskSpec) -> list[EvaluationSettings]:
    """The measurements of one task: its classifier, then each pair that it trains."""
    base = {"data_set": task.data_set}
    out = []
    if task.classified is not None and task.classified in task.media:
        out.append({"kind": "classify", "modality": task.classified, "classes": list(task.classes)})
    weights = dict(task.pair_weights)
    names = {task.embedder(m): m for m in task.modalities}
    for pair in task.pairs:
        if weights.get(pair) == 0:
            continue
        first, other = sorted((names[e] for e in _embedders_of(pair, names)), key=_text_last)
        kind = "zero_shot" if other == "text" and task.text == "labels" else "retrieval"
        entry = {"kind": kind, "modality": first}
        out.append(entry | ({"classes": list(task.classes)} if kind == "zero_shot" else {"other": other}))
    return [EvaluationSettings(**base | entry) for entry in out]


def _embedders_of(pair: str, names: Iterable[str]) -> list[str]:
    """The two of some layers' names that a pair's name is made of."""
    return list(next(two for two in terms.pairs(names) if terms.pair_name(two) == pair))


def _text_last(modality: str) -> tuple[bool, bool, str]:
    return modality == "text", modality == "audio", modality
