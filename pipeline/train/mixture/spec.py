"""The drawing of tasks as plain data: weights, and their shares of the steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from pipeline.data.spec import TaskSpec
from pipeline.train.mixture.settings import SamplerSettings


@dataclasses.dataclass(frozen=True)
class SamplerSpec(SamplerSettings):
    """``sampler.*`` of a recipe, and the weights and shares of tasks that follow from it.

    The paper's rule is the kind "multinomial", the authors' release has "round_robin", PolyViT's weighted task sampling
    is "exact"; max_weight is T5's limit on the number of examples.
    """

    def weights(self, tasks: Mapping[str, TaskSpec], num_rows: Mapping[str, int]) -> dict[str, float]:
        """Task → weight as given, else the number of examples of its data set."""
        out = {}
        for name, task in tasks.items():
            weight = float(num_rows[task.data_set] if task.weight is None else task.weight)
            weight = min(weight, self.max_weight or math.inf)
            out[name] = weight * (len(task.variants) if self.variant_weight == "full" else 1)
        return out

    def runs(self, tasks: Mapping[str, TaskSpec]) -> set[str]:
        """The tasks with a weight above zero in any stage."""
        staged = {name for stage in self.stages for name, weight in stage.weights.items() if weight > 0}
        return {name for name, task in tasks.items() if task.weight != 0 or name in staged}

    def shares(self, weights: np.ndarray) -> np.ndarray:
        """(.., tasks) weights → their shares of the steps, which sum to 1."""
        weights = np.asarray(weights, np.float64)
        if self.kind == "uniform":
            weights = (weights > 0).astype(np.float64)
        # Scaled first: the largest weight to a high power must not overflow.
        weights = (weights / weights.max(-1, keepdims=True)) ** (1 / self.temperature) * (weights > 0)
        shares = weights / weights.sum(-1, keepdims=True)
        if self.max_share is None:
            return shares
        # Between two stages all steps have the same shares.
        rows, which = np.unique(shares.reshape(-1, shares.shape[-1]), axis=0, return_inverse=True)
        return np.array([_capped(row, self.max_share) for row in rows])[which.ravel()].reshape(shares.shape)

    def weights_at(self, steps: np.ndarray, weights: Mapping[str, float]) -> np.ndarray:
        """(steps, tasks): the weights at every step."""
        columns = []
        for name, weight in weights.items():
            own = [(stage.from_step, stage.weights[name]) for stage in self.stages if name in stage.weights]
            own = own if own and own[0][0] == 0 else [(0, weight), *own]
            starts, values = np.asarray(own, np.float64).T
            if self.ramp:
                columns.append(np.interp(steps, starts, values))
            else:
                columns.append(values[np.searchsorted(starts, steps, side="right") - 1])
        return np.stack(columns, -1)


def _capped(shares: np.ndarray, max_share: float) -> np.ndarray:
    """Limits shares to ``max_share``; the others keep their proportions."""
    max_share = max(max_share, 1.0 / max(1, (shares > 0).sum()))
    capped = np.zeros(len(shares), bool)
    while True:
        free = ~capped
        left = 1.0 - max_share * capped.sum()
        total = shares[free].sum()
        out = np.where(capped, max_share, shares * (left / total if total else 0.0))
        over = free & (out > max_share * (1 + 1e-12))
        if not over.any():
            return out
        capped |= over
