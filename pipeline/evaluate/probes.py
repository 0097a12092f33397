"""Classifiers that learn from labelled rows on frozen features: a linear probe, k-NN, and one without a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

from pipeline.errors import RequestError
from pipeline.evaluate.metrics import classification, several_labels

# Neighbours that vote, and the temperature of their weights (Caron et al. 2021, arXiv 2104.14294).
NEIGHBOURS = 20
_TEMPERATURE = 0.07
# Inverse strengths of the linear probe's regularisation that are tried.
_STRENGTHS = tuple(10.0**power for power in range(-4, 3))
# Every n-th row to learn from, after a shuffle, judges the regularisation.
_JUDGING = 5
# Maximum iterations of the linear probe's solver.
_ITERATIONS = 1000
# Logit of a class that every row to learn from has; its negative is that of one that none has.
_CERTAIN = 1e9
# Values of a sample that the baseline compares; more are averaged with their neighbours.
_RAW_VALUES = 4096
# Maximum distances in memory at a time.
_BLOCK = 1 << 23


def linear_probe(features: np.ndarray, targets: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, dict]:
    """((queries, classes) logits, facts) of logistic regression, its regularisation chosen on a part of the rows.

    features: (n, width). targets: (n, classes) bool. Raises RequestError without scikit-learn, or if the rows to learn
    from have fewer than two classes.
    """
    probe, facts = _probe(features, targets)
    return probe(queries), facts


def linear_layer(features: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``linear_probe`` as (kernel (width, classes), bias (classes,)), float32."""
    probe, _ = _probe(features, targets)
    width = features.shape[1]
    bias = probe(np.zeros((1, width)))[0]
    kernel = probe(np.eye(width)) - bias
    return kernel.astype(np.float32), bias.astype(np.float32)


def _probe(features: np.ndarray, targets: np.ndarray) -> tuple[Callable[[np.ndarray], np.ndarray], dict]:
    """(features → logits, facts)."""
    if targets.any(0).sum() < 2:
        raise RequestError("linear_probe: expected rows of at least two classes to learn from, found fewer")
    mean, std = features.mean(0), np.maximum(features.std(0), 1e-6)
    features = (features - mean) / std
    order = np.random.default_rng(0).permutation(len(features))
    judges, rest = order[::_JUDGING], np.delete(order, np.s_[::_JUDGING])
    strength = _STRENGTHS[len(_STRENGTHS) // 2]
    if targets[rest].any(0).sum() >= 2:
        quality = [
            _quality(_fitted(features[rest], targets[rest], c)(features[judges]), targets[judges]) for c in _STRENGTHS
        ]
        # The strongest regularisation among equals.
        strength = _STRENGTHS[int(np.argmax(quality))]
    logits = _fitted(features, targets, strength)
    return lambda x: logits((x - mean) / std), {"fit_rows": len(features), "regularisation": strength}


def _quality(scores: np.ndarray, targets: np.ndarray) -> float:
    if (targets.sum(1) > 1).any():
        metrics, _ = several_labels(scores, targets)
    else:
        metrics, _ = classification(scores, targets.argmax(1))
    return next(iter(metrics.values())).value()


def _fitted(features: np.ndarray, targets: np.ndarray, strength: float) -> Callable[[np.ndarray], np.ndarray]:
    """The logits of a probe that was fitted. strength: the inverse one of the regularisation."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ModuleNotFoundError as e:
        raise RequestError("linear_probe needs scikit-learn: pip install 'imp-pretrain[evaluate]'") from e
    one_each = (targets.sum(1) == 1).all()
    columns = np.flatnonzero(targets.any(0)) if one_each else np.flatnonzero(targets.any(0) & ~targets.all(0))
    wanted = [targets.argmax(1)] if one_each else [targets[:, c] for c in columns]
    with warnings.catch_warnings():
        # One that has not converged is judged like the others.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fits = [
            LogisticRegression(C=strength, max_iter=_ITERATIONS).fit(features.astype(np.float64), y) for y in wanted
        ]

    def logits(queries: np.ndarray) -> np.ndarray:
        # Certain where all rows agree: no regression can be fitted to one answer.
        out = np.tile(np.where(targets.all(0), _CERTAIN, -_CERTAIN), (len(queries), 1))
        if not fits:
            return out
        found = np.stack([fit.decision_function(queries.astype(np.float64)) for fit in fits], axis=-1)
        if one_each:
            found = found[..., 0]
            # Of two classes there is one logit, of the second.
            found = np.stack([-found, found], axis=1) if found.ndim == 1 else found
        out[:, columns] = found
        return out

    return logits


def nearest_neighbours(features: np.ndarray, targets: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, dict]:
    """((queries, classes) votes, facts) of the nearest rows by cosine, weighted by exp(cosine / temperature)."""
    count = min(NEIGHBOURS, len(features))
    votes = np.zeros((len(queries), targets.shape[1]))
    features, queries = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (features, queries))
    for rows in _blocks(len(queries), len(features)):
        cosines = queries[rows] @ features.T
        nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
        weights = np.exp((np.take_along_axis(cosines, nearest, axis=1) - 1) / _TEMPERATURE)
        votes[rows] = np.einsum("nk,nkc->nc", weights, targets[nearest].astype(np.float64))
    return votes, {"fit_rows": len(features), "neighbours": count}


def nearest_row(features: np.ndarray, targets: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """(queries, classes): the targets of the nearest row by Euclidean distance."""
    out = np.zeros((len(queries), targets.shape[1]))
    squares = (features.astype(np.float64) ** 2).sum(1)
    for rows in _blocks(len(queries), len(features)):
        distances = squares - 2 * (queries[rows].astype(np.float64) @ features.T.astype(np.float64))
        out[rows] = targets[distances.argmin(1)]
    return out


def _blocks(count: int, width: int) -> list[slice]:
    step = max(1, _BLOCK // max(1, width))
    return [slice(start, start + step) for start in range(0, count, step)]


class RawValues:
    """In place of a model: the pixels or spectrogram values of samples, averaged with their neighbours."""

    def features(self, modality: str, samples: list[dict]) -> np.ndarray:
        """(n, values) float32."""
        values = np.stack([s["tokens"].astype(np.float32).ravel() for s in samples])
        step = -(-values.shape[1] // _RAW_VALUES)
        missing = -values.shape[1] % step
        padded = np.pad(values, ((0, 0), (0, missing)), mode="edge")
        return padded.reshape(len(values), -1, step).mean(2)
