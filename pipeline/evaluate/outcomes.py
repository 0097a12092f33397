"""Values of metrics with their intervals, from the outcomes of single rows.

The bootstrap (Efron 1979) draws as many rows as there are, with replacement, and takes percentiles of the metric. Rows
of equal outcome are drawn together, by how often they occur: neither a value nor its interval depends on the order of
rows, and the cost hardly grows with their number.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

# Share of the resampled values that lie within an interval.
CONFIDENCE = 0.95
_SEED = 0
# Maximum operations of one interval; larger ones are made from fewer resamples, or not at all.
_MAX_OPERATIONS = 400_000_000
# Minimum number of resamples that an interval is made from.
_MIN_RESAMPLES = 100


class Metric(Protocol):
    """A metric over rows."""

    def value(self) -> float: ...

    def resampled(self, count: int) -> np.ndarray:
        """(count,) values over rows drawn with replacement; fewer or none where that would take long."""
        ...


@dataclasses.dataclass(frozen=True)
class Mean:
    """The mean outcome. outcomes: (n,), of any order."""

    outcomes: np.ndarray

    def value(self) -> float:
        """The mean, the same for any order of rows."""
        return float(np.sort(self.outcomes).mean())

    def resampled(self, count: int) -> np.ndarray:
        """Means over drawn rows."""
        values, times = np.unique(self.outcomes, return_counts=True)
        drawn = _draws(times, count)
        return drawn @ values / times.sum()


@dataclasses.dataclass(frozen=True)
class MeanOfClasses:
    """The mean over classes of their rows' mean outcome. outcomes, classes: (n,)."""

    outcomes: np.ndarray
    classes: np.ndarray

    def of_classes(self) -> dict[int, float]:
        """Class → its mean outcome; classes without rows are left out."""
        return {int(c): float(np.sort(self.outcomes[self.classes == c]).mean()) for c in np.unique(self.classes)}

    def value(self) -> float:
        """The mean over the classes that have rows."""
        return float(np.mean(list(self.of_classes().values())))

    def resampled(self, count: int) -> np.ndarray:
        """Means over the classes that were drawn."""
        pairs = np.stack([self.classes, self.outcomes], axis=1).astype(np.float64)
        kinds, times = np.unique(pairs, axis=0, return_counts=True)
        _, which = np.unique(kinds[:, 0], return_inverse=True)
        starts = np.flatnonzero(np.diff(which, prepend=-1))
        drawn = _draws(times, count)
        of_class = np.add.reduceat(drawn, starts, axis=1)
        with np.errstate(invalid="ignore"):
            recalls = np.add.reduceat(drawn * kinds[:, 1], starts, axis=1) / of_class
        return np.nanmean(recalls, axis=1) if len(recalls) else np.zeros(0)


@dataclasses.dataclass(frozen=True)
class Median:
    """The median outcome. outcomes: (n,), of any order."""

    outcomes: np.ndarray

    def value(self) -> float:
        """The median."""
        return float(np.median(self.outcomes))

    def resampled(self, count: int) -> np.ndarray:
        """Medians over drawn rows, the lower of two middle ones."""
        values, times = np.unique(self.outcomes, return_counts=True)
        reached = np.cumsum(_draws(times, count), axis=1)
        return values[(2 * reached >= times.sum()).argmax(1)] if len(reached) else np.zeros(0)


@dataclasses.dataclass(frozen=True)
class AveragePrecision:
    """The mean average precision over classes. scores: (n, classes). targets: (n, classes) bool.

    A class's precision is averaged over its rows, ranked by score; rows of equal score share the precision after the
    last of them. Classes without a row are left out. Raises ValueError if none has one.
    """

    scores: np.ndarray
    targets: np.ndarray

    def of_classes(self) -> dict[int, float]:
        """Class → its average precision."""
        ones = np.ones((1, len(self.scores)))
        return {c: float(self._precisions(c, ones)[0]) for c in np.flatnonzero(self.targets.any(0)).tolist()}

    def value(self) -> float:
        """The mean over the classes that have rows."""
        found = list(self.of_classes().values())
        if not found:
            raise ValueError("no row has a class")
        return float(np.mean(found))

    def resampled(self, count: int) -> np.ndarray:
        """Means over the classes that were drawn."""
        rows, classes = len(self.scores), np.flatnonzero(self.targets.any(0))
        count = _affordable(count, 8 * rows * len(classes))
        drawn = np.random.default_rng(_SEED).multinomial(rows, np.full(rows, 1 / rows), size=count)
        if not count:
            return np.zeros(0)
        return np.nanmean([self._precisions(c, drawn) for c in classes.tolist()], axis=0)

    def _precisions(self, number: int, weights: np.ndarray) -> np.ndarray:
        """Average precision of a class with each row counted ``weights`` (k, n) times: (k,), NaN without one."""
        order = np.argsort(-self.scores[:, number], kind="stable")
        ranked = self.scores[order, number]
        last = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
        ordered = weights[:, order]
        every = np.cumsum(ordered, axis=1)[:, last]
        right = np.cumsum(ordered * self.targets[order, number], axis=1)[:, last]
        gained = np.diff(right, axis=1, prepend=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(gained > 0, gained * right / np.maximum(every, 1), 0.0).sum(1) / right[:, -1]


def interval(metric: Metric, *, resamples: int) -> list[float] | None:
    """[low, high] of a metric; None where no resamples are wanted or affordable."""
    values = metric.resampled(resamples) if resamples else np.zeros(0)
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    edge = (1 - CONFIDENCE) / 2
    return [float(x) for x in np.quantile(values, [edge, 1 - edge])]


def _draws(times: np.ndarray, count: int) -> np.ndarray:
    """(count, kinds): how often rows of each kind are drawn. times: occurrences of each kind."""
    total = int(times.sum())
    count = _affordable(count, 20 * len(times))
    return np.random.default_rng(_SEED).multinomial(total, times / total, size=count)


def _affordable(count: int, operations: int) -> int:
    """The number of resamples that can be had, each of that many operations; 0 if they are too few."""
    fitting = min(count, _MAX_OPERATIONS // max(1, operations))
    return fitting if fitting >= min(count, _MIN_RESAMPLES) else 0
