"""The loss of a model that has learned nothing: its features or logits are alike for all samples."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from model.structure import Structure

# A loss above this part of chance is at chance.
_AT_CHANCE = 0.98


def is_guess(loss: float, chance: float) -> bool:
    """Whether a loss is not clearly below that of guessing; never if guessing has none."""
    return chance > 0 and loss > _AT_CHANCE * chance


def chance_of(structure: Structure, positive_ids: np.ndarray | None) -> float:
    """The weighted sum over the terms of a structure's loss, without the router's own.

    positive_ids: (samples, 2) int32 of this process's part of the batch, where a term compares modalities; the rest is
    taken to be alike.
    """
    rows = None if positive_ids is None else _positives(positive_ids, structure.global_batch_size)
    return sum(weight * _of_term(name, structure, rows) for name, weight in structure.objectives)


def _positives(ids: np.ndarray, batch_size: int) -> np.ndarray:
    """For each local row the number of its positives in the whole batch, itself included."""
    # The two words of an id as one, which sorts faster.
    whole = np.ascontiguousarray(ids, np.int32).view(np.int64).ravel()
    _, which, counts = np.unique(whole, return_inverse=True, return_counts=True)
    others = (counts[which.ravel()] - 1) / max(1, len(ids) - 1)
    return 1 + others * (batch_size - 1)


def _of_term(name: str, structure: Structure, positives: np.ndarray | None) -> float:
    if name == "softmax":
        return math.log(len(structure.classes))
    if name == "sigmoid":
        return math.log(2)  # of every class, and the loss is their mean
    batch = structure.global_batch_size
    if name == "nce":
        # All similarities are equal: each row has its positives' part of the batch.
        return float(np.log(batch / positives).mean())
    # Sigmoid over pairs, summed over the batch: the best that an offset alone can do is the entropy of a pair.
    share = float(positives.mean()) / batch
    return 0.0 if share >= 1 else -batch * (share * math.log(share) + (1 - share) * math.log1p(-share))
