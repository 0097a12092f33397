"""Which task each step runs: a pure function of (seed, step)."""

from __future__ import annotations

import numpy as np

from pipeline.data import order


class Multinomial:
    """One draw a step from a multinomial (paper section 3.1: p proportional to the number of examples of a task)."""

    def __init__(self, weights: dict[str, float], *, seed: int):
        self.names, self.seed = tuple(weights), seed
        values = np.asarray(list(weights.values()), np.float64)
        self.probabilities = values / values.sum()

    def tasks(self, start: int, stop: int) -> np.ndarray:
        """Task index of the steps start .. stop - 1 (steps counted from 0)."""
        return order.tasks_at(self.seed, np.arange(start, stop), probabilities=self.probabilities)

    def counts(self, step: int) -> dict[str, int]:
        """How many of the first ``step`` steps each task gets."""
        counts = np.bincount(self.tasks(0, step), minlength=len(self.names)) if step else np.zeros(len(self.names), int)
        return dict(zip(self.names, counts.tolist(), strict=True))
