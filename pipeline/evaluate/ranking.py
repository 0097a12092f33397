"""Places of right candidates in rankings, with ties broken by chance: the expectation over every order of equal scores.

A model that gives every candidate the same score gets exactly chance.
"""

from __future__ import annotations

import dataclasses

import numpy as np

# Maximum difference of scores that count as equal: cosines of equal vectors differ in their last bits.
TOLERANCE = 2.0**-20


@dataclasses.dataclass(frozen=True)
class Places:
    """The best right candidate of each query. All (n,) int64.

    better: candidates of a higher score. tied: those of the same score, itself included. right: the right ones of them.
    """

    better: np.ndarray
    tied: np.ndarray
    right: np.ndarray

    def hits(self, k: int) -> np.ndarray:
        """(n,) probability that a right candidate is among the first k."""
        drawn = np.clip(k - self.better, 0, self.tied)
        wrong = self.tied - self.right
        missed = np.ones(len(self.tied))
        for i in range(min(k, int(drawn.max(initial=0)))):
            left = np.maximum(wrong - i, 0) / np.maximum(self.tied - i, 1)
            missed *= np.where(i < drawn, left, 1.0)
        return 1.0 - missed

    def ranks(self) -> np.ndarray:
        """(n,) expected rank of the first right candidate, from 1."""
        return self.better + (self.tied + 1) / (self.right + 1)


def places(scores: np.ndarray, right: np.ndarray, *, tolerance: float = TOLERANCE) -> Places:
    """scores: (n, candidates). right: (n, candidates) bool, at least one a query.

    A score that is not finite counts as the worst for a right candidate, and as the best for another.
    """
    scores = np.where(np.isfinite(scores), scores, np.where(right, -np.inf, np.inf))
    best = np.where(right, scores, -np.inf).max(1, keepdims=True)
    tied = (scores >= best - tolerance) & (scores <= best + tolerance)
    better = (scores > best + tolerance).sum(1)
    return Places(better, tied.sum(1), (tied & right).sum(1))


def of_chance(num_right: np.ndarray, num_candidates: int) -> Places:
    """The places of a model to which all candidates are alike. num_right: (n,) of each query."""
    return Places(np.zeros_like(num_right), np.full_like(num_right, num_candidates), num_right)


def joined(parts: list[Places]) -> Places:
    """The places of several blocks of queries as one."""
    return Places(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Places)))
