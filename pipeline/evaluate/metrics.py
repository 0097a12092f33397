"""Metrics over numpy arrays, named as in CLIP_benchmark where it has them.

Retrieval is named by what is compared: ``image_retrieval`` and ``text_retrieval`` for images and texts, as there; any
other pair by query and candidate, so that ``audio_text_retrieval_recall@5`` is the share of sounds with one of their
texts among the five nearest.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from pipeline.data.modalities import TEXT
from pipeline.evaluate.outcomes import AveragePrecision, Mean, MeanOfClasses, Median, Metric
from pipeline.evaluate.ranking import Places, joined, of_chance, places

# Ranks up to which a right candidate counts.
RECALL_AT = (1, 5, 10)
# Maximum number of scores that are compared at a time.
_BLOCK = 1 << 23
# Name → metric, and name → its value of guessing.
Measured = tuple[dict[str, Metric], dict[str, float]]


def classification(scores: np.ndarray, labels: np.ndarray, *, prefix: str = "") -> Measured:
    """scores (n, classes), labels (n,) → acc1, acc5 (of more than five classes), mean_per_class_recall."""
    rows, classes = scores.shape
    step = max(1, _BLOCK // classes)
    ranked = joined(
        [
            places(scores[i : i + step], labels[i : i + step, None] == np.arange(classes), tolerance=0.0)
            for i in range(0, rows, step)
        ]
    )
    first = ranked.hits(1)
    metrics: dict[str, Metric] = {"acc1": Mean(first)}
    chance = {"acc1": 1 / classes}
    if classes > 5:
        metrics["acc5"] = Mean(ranked.hits(5))
        chance["acc5"] = 5 / classes
    metrics["mean_per_class_recall"] = MeanOfClasses(first, labels)
    chance["mean_per_class_recall"] = 1 / classes
    return {prefix + n: m for n, m in metrics.items()}, {prefix + n: c for n, c in chance.items()}


def several_labels(scores: np.ndarray, targets: np.ndarray, *, prefix: str = "") -> Measured:
    """scores, targets (n, classes) → mean_average_precision. Guessing has the share of a class's rows."""
    share = targets.mean(0)
    name = f"{prefix}mean_average_precision"
    return {name: AveragePrecision(scores, targets)}, {name: float(share[share > 0].mean())}


def retrieval(
    first: np.ndarray,
    second: np.ndarray,
    keys: tuple[Sequence[frozenset[Hashable]], Sequence[frozenset[Hashable]]],
    names: tuple[str, str],
) -> Measured:
    """Both ways between (n, K) and (m, K) of unit length.

    keys: those of each item on either side; two items with a key in common are right for each other, and each has at
    least one that is right. names: the modalities, text second.
    """
    metrics, chance = {}, {}
    ways = ((first, second, *keys, *names), (second, first, *keys[::-1], *names[::-1]))
    for queries, candidates, of_queries, of_candidates, query, candidate in ways:
        found, num_right = _nearest(queries, candidates, of_queries, of_candidates)
        name, guess = retrieval_name(query, candidate), of_chance(num_right, len(candidates))
        for k in RECALL_AT:
            metrics[f"{name}_recall@{k}"] = Mean(found.hits(k))
            chance[f"{name}_recall@{k}"] = Mean(guess.hits(k)).value()
        metrics[f"{name}_median_rank"] = Median(found.ranks())
        chance[f"{name}_median_rank"] = Median(guess.ranks()).value()
    return metrics, chance


def retrieval_name(query: str, candidate: str) -> str:
    """The name of finding candidates by queries."""
    if {query, candidate} == {"image", TEXT}:
        return f"{candidate}_retrieval"
    return f"{query}_{candidate}_retrieval"


def _nearest(
    queries: np.ndarray,
    candidates: np.ndarray,
    of_queries: Sequence[frozenset[Hashable]],
    of_candidates: Sequence[frozenset[Hashable]],
) -> tuple[Places, np.ndarray]:
    """(the places of the right candidates, their number for each query)."""
    members: dict[Hashable, list[int]] = {}
    for number, keys in enumerate(of_candidates):
        for key in keys:
            members.setdefault(key, []).append(number)
    parts, counts = [], []
    step = max(1, _BLOCK // len(candidates))
    for start in range(0, len(queries), step):
        block = queries[start : start + step]
        right = np.zeros((len(block), len(candidates)), bool)
        for row, keys in enumerate(of_queries[start : start + step]):
            for key in keys:
                right[row, members.get(key, [])] = True
        parts.append(places(block @ candidates.T, right))
        counts.append(right.sum(1))
    return joined(parts), np.concatenate(counts)
