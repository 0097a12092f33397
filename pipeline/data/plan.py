"""The samples of each batch of a task, and the row of arrays a batch becomes. numpy only."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from pipeline.data import order
from pipeline.data.spec import TaskSpec, Variant


@dataclasses.dataclass(frozen=True)
class Row:
    """One (batch, rank) of a task. batch: index within the task.

    arrays: this rank's samples along the leading axis, named "<modality>/<kind>", e.g. "vision/tokens".
    rejects: bad samples met on the way, as dicts of id, data_set, source, reason, detail; with position and attempt if
    the reason is transient, with journalled if it was known when the run resumed, with substitute if it was met in the
    place of another reject.
    """

    task: str
    batch: int
    rank: int
    variant: str
    ids: list[str]
    rejects: list[dict]
    arrays: dict[str, np.ndarray]


class Arrival(NamedTuple):
    """When a row was decoded, and when it was in this process; by its ``time.perf_counter``."""

    decoded_at: float
    here_at: float


class TaskPlan:
    """The samples of each batch of a task: arithmetic on (seed, task, number of batches).

    num_rows: of the data set. num_batches: needed by the whole run.
    """

    def __init__(self, task: TaskSpec, *, seed: int, num_rows: int, num_batches: int):
        self.task = task
        self.order = order.Order(seed, task.name, num_rows)
        sizes = np.array([v.global_batch_size for v in task.variants])
        self.variants = order.variants_at(seed, task.name, np.arange(num_batches), num_variants=len(sizes))
        self.starts = np.concatenate([[0], np.cumsum(sizes[self.variants])])

    def batch(self, index: int, *, rank: int, world_size: int) -> tuple[Variant, range]:
        """(variant, this rank's positions) of the task's batch ``index``; ranks share a batch in equal parts."""
        variant = self.task.variants[self.variants[index]]
        share = variant.global_batch_size // world_size
        start = int(self.starts[index]) + rank * share
        return variant, range(start, start + share)


def reject_key(reject: dict) -> str | tuple[int, int]:
    """The visits a reject applies to: all of a sample, by its id, or the one (position, attempt) that found it."""
    return (reject["position"], reject["attempt"]) if "position" in reject else reject["id"]


def group_arrays(arrays: dict[str, np.ndarray]) -> dict:
    """{"vision/tokens": ...} → {"vision": {"tokens": ...}}, the form ``model.imp.Imp.loss`` takes."""
    out: dict = {}
    for name, value in arrays.items():
        modality, slash, kind = name.partition("/")
        if slash:
            out.setdefault(modality, {})[kind] = value
        else:
            out[name] = value
    return out


def model_modalities(task: TaskSpec) -> tuple[str, ...]:
    """The task's modalities as the model names them."""
    return tuple(task.embedder(m) for m in task.modalities)
