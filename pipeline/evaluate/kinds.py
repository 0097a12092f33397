"""The kinds of measurement: zero-shot, classifier, retrieval, linear probe, k-NN."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from pipeline.errors import RequestError, some_of
from pipeline.evaluate import probes
from pipeline.evaluate.evaluator import Evaluator, prompts_of
from pipeline.evaluate.held_out import HeldOut
from pipeline.evaluate.measurement import Measurement, classes_of
from pipeline.evaluate.metrics import classification, retrieval, several_labels
from pipeline.evaluate.outcomes import Metric
from pipeline.export.features import mean_over_clips, unit

# (features or values to learn from, their targets, those to judge) → (scores, facts).
Learner = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, dict]]


@dataclasses.dataclass(frozen=True)
class Result:
    """metrics and chance by name. facts: further values of the entry in the results. baseline: metrics without
    learning."""

    metrics: dict[str, Metric]
    chance: dict[str, float]
    num_examples: int
    num_rejected: int
    classes: list[str] | None = None
    facts: dict = dataclasses.field(default_factory=dict)
    baseline: dict[str, float] = dataclasses.field(default_factory=dict)


def zero_shot(evaluator: Evaluator, measurement: Measurement) -> Result:
    """Cosines with the mean of each class's prompts, averaged over a row's clips."""
    rows = evaluator.rows(measurement)
    classes, chosen, targets = targets_of(measurement, rows)
    task = measurement.task
    assert task is not None
    anchors = evaluator.anchors(measurement, task, classes)
    source = measurement.side.embedder

    def cosines(features: np.ndarray) -> np.ndarray:
        return unit(evaluator.model.project(features, source=source, target="text")) @ anchors.T

    scores = mean_over_clips(cosines, rows.features[chosen])
    facts = {"prompts": prompts_of(measurement)}
    return _classified(evaluator, measurement, scores, targets, classes, rows, facts=facts)


def classify(evaluator: Evaluator, measurement: Measurement) -> Result:
    """Logits of the classifier that a task trained, averaged over a row's clips."""
    rows, task = evaluator.rows(measurement), measurement.task
    assert task is not None
    columns = {name: i for i, name in enumerate(evaluator.model.data_sets[task.data_set].classes)}
    classes, chosen, targets = targets_of(measurement, rows)
    unknown = set(classes) - columns.keys()
    if unknown:
        raise RequestError(f"evaluate: {some_of(sorted(unknown))}: no classes of {task.data_set}'s classifier")
    logits = mean_over_clips(lambda x: evaluator.model.logits(x, task.data_set), rows.features[chosen])
    scores = logits[:, [columns[c] for c in classes]]
    return _classified(evaluator, measurement, scores, targets, classes, rows)


def linear_probe(evaluator: Evaluator, measurement: Measurement) -> Result:
    """Logistic regression on the mean of a row's pooled features."""
    return _learned(evaluator, measurement, probes.linear_probe, "lp_")


def knn(evaluator: Evaluator, measurement: Measurement) -> Result:
    """The nearest rows to learn from, by the mean of a row's pooled features."""
    return _learned(evaluator, measurement, probes.nearest_neighbours, "knn_")


def _learned(evaluator: Evaluator, measurement: Measurement, learn: Learner, prefix: str) -> Result:
    rows, fit = evaluator.rows(measurement), evaluator.fit_rows(measurement)
    classes, chosen, targets = targets_of(measurement, rows, more=fit)
    _, known, learned = targets_of(measurement, fit, classes=classes)
    measured, known_classes = ([classes[i] for i in np.flatnonzero(t.any(0))] for t in (targets, learned))
    if not set(measured) & set(known_classes):
        raise RequestError(
            f"{measurement.settings.kind}: expected rows to learn from with the classes of {measurement.label} "
            f"({some_of(measured)}), found {some_of(known_classes)}; name others with fit"
        )
    scores, facts = learn(fit.features[known].mean(1), learned, rows.features[chosen].mean(1))
    return _classified(evaluator, measurement, scores, targets, classes, rows, prefix=prefix, facts=facts)


def compare(evaluator: Evaluator, measurement: Measurement) -> Result:
    """Retrieval both ways, with a row's clips averaged before embeddings are normalised."""
    if len(measurement.sides) == 1:
        return _media_and_texts(evaluator, measurement)
    first, second = (evaluator.rows(measurement, side) for side in measurement.sides)
    # Rows of which both could be decoded.
    shared = sorted(set(first.numbers) & set(second.numbers))
    if not shared:
        raise RequestError("evaluate: no row has both modalities, so nothing to retrieve")
    first, second = (r.take([i for i, n in enumerate(r.numbers) if n in set(shared)]) for r in (first, second))
    keys = _row_keys(evaluator, measurement, first)
    one, other = measurement.sides
    vectors = [
        evaluator.embed_rows(rows, source=a.embedder, target=b.embedder)
        for rows, a, b in ((first, one, other), (second, other, one))
    ]
    metrics, chance = retrieval(vectors[0], vectors[1], (keys, keys), (one.modality, other.modality))
    rejected = first.rejected + len(evaluator.rows(measurement).rows) - len(shared)
    return Result(metrics, chance, len(shared), rejected, facts={"positives": measurement.positives})


def _media_and_texts(evaluator: Evaluator, measurement: Measurement) -> Result:
    rows, task = evaluator.rows(measurement), measurement.task
    assert task is not None
    captions = evaluator.captions(rows, task)
    kept = [i for i, texts in enumerate(captions) if texts]
    if not kept:
        raise RequestError(f"evaluate: no row of {measurement.label} has a usable text, so nothing to retrieve")
    captions, texts_of = [captions[i] for i in kept], rows.take(kept)
    embedder = measurement.side.embedder
    media = evaluator.embed_rows(texts_of, source=embedder, target="text")
    texts = [t for row in captions for t in row]
    vectors = unit(evaluator.embed_texts(task, texts, target=embedder))
    keys = _row_keys(evaluator, measurement, texts_of)
    owners = [keys[i] for i, row in enumerate(captions) for _ in row]
    if measurement.positives == "text":
        owners = [frozenset([_text_key(t)]) for t in texts]
    metrics, chance = retrieval(media, vectors, (keys, owners), (measurement.side.modality, "text"))
    facts = {
        "positives": measurement.positives,
        "num_texts": len(texts),
        "num_without_text": len(rows.rows) - len(kept),
    }
    return Result(metrics, chance, len(kept), rows.rejected, facts=facts)


def _row_keys(evaluator: Evaluator, measurement: Measurement, rows: HeldOut) -> list[frozenset[Hashable]]:
    """Keys of which two rows that are right for each other share one, as training counts positives."""
    task, kind = measurement.task, measurement.positives
    assert task is not None
    known = set(task.classes or evaluator.model.data_sets[task.data_set].classes)
    out: list[frozenset[Hashable]] = []
    for number, labels, texts in zip(rows.numbers, rows.labels, evaluator.captions(rows, task), strict=True):
        counted = sorted(c for c in labels if c in known) if known & set(labels) else sorted(labels)
        found: set[Hashable] = set()
        if kind == "labels" and counted:
            found = {"\n".join(counted)}
        elif kind == "text":
            found = {_text_key(t) for t in texts}
        out.append(frozenset(found or {number}))
    return out


def _text_key(text: str) -> str:
    return text.strip().lower()


KINDS: dict[str, Callable[[Evaluator, Measurement], Result]] = {
    "zero_shot": zero_shot,
    "classify": classify,
    "retrieval": compare,
    "linear_probe": linear_probe,
    "knn": knn,
}


def targets_of(
    measurement: Measurement, rows: HeldOut, *, classes: list[str] | None = None, more: HeldOut | None = None
) -> tuple[list[str], list[int], np.ndarray]:
    """(classes, rows with one of them, their (n, classes) bool targets). more: further rows whose labels count."""
    if classes is None:
        classes = classes_of(measurement, [*rows.labels, *(more.labels if more else [])])
    place = {name: i for i, name in enumerate(classes)}
    found = [[place[c] for c in labels if c in place] for labels in rows.labels]
    chosen = [i for i, labels in enumerate(found) if labels]
    if not chosen:
        raise RequestError(
            f"evaluate: no row of {measurement.label} has one of the classes {some_of(classes) or '(none are named)'}"
        )
    targets = np.zeros((len(chosen), len(classes)), bool)
    for row, i in enumerate(chosen):
        targets[row, found[i]] = True
    return classes, chosen, targets


def _classified(
    evaluator: Evaluator,
    measurement: Measurement,
    scores: np.ndarray,
    targets: np.ndarray,
    classes: list[str],
    rows: HeldOut,
    *,
    prefix: str = "",
    facts: dict | None = None,
) -> Result:
    metrics, chance = _scored(scores, targets, prefix)
    baseline = _baseline(evaluator, measurement, classes, prefix) if measurement.settings.baseline else {}
    return Result(metrics, chance, len(targets), rows.rejected, classes, facts or {}, baseline)


def _scored(scores: np.ndarray, targets: np.ndarray, prefix: str) -> tuple[dict[str, Metric], dict[str, float]]:
    """Accuracies, or average precision where a row has several of the classes."""
    if (targets.sum(1) > 1).any():
        return several_labels(scores, targets, prefix=prefix)
    return classification(scores, targets.argmax(1), prefix=prefix)


def _baseline(evaluator: Evaluator, measurement: Measurement, classes: Sequence[str], prefix: str) -> dict[str, float]:
    """The metrics of the nearest row in pixels or spectrogram values; accuracy at five is not its own."""
    settings = measurement.settings
    rows = evaluator.raw(measurement, measurement.manifest, settings.max_rows)
    fit = evaluator.raw(measurement, measurement.fit_manifest, settings.max_fit_rows)
    _, chosen, targets = targets_of(measurement, rows, classes=list(classes))
    _, known, learned = targets_of(measurement, fit, classes=list(classes))
    scores = probes.nearest_row(fit.features[known][:, 0], learned, rows.features[chosen][:, 0])
    metrics, _ = _scored(scores, targets, prefix)
    return {name: metric.value() for name, metric in metrics.items() if not name.endswith("acc5")}
