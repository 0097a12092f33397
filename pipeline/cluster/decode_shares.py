"""How streams share the CPUs that decode."""

from __future__ import annotations

import dataclasses

import ray

from pipeline.data.blocks import MIN_BLOCK_S, maker_of
from pipeline.data.stream_spec import StreamSpec
from pipeline.errors import DataError, RequestError

# Below this number of CPUs each stream has one decoder, and there is nothing to share.
_MIN_SHARED_CPUS = 3
# Part of the CPUs that is dealt out evenly.
_EVEN_PART = 0.1


@dataclasses.dataclass(frozen=True)
class DecodeShare:
    """One stream's part of the CPUs. row_s: measured CPU seconds of one of its rows; None if not measured."""

    cpus: float = 1.0
    row_s: float | None = None

    @property
    def num_decoders(self) -> int:
        return max(1, round(self.cpus))


def decode_shares(specs: list[StreamSpec], *, cpus: float, world_size: int = 1) -> dict[str, DecodeShare]:
    """Task → its share of ``cpus``, by its number of steps and the measured cost of a batch.

    Measures in the cluster, all tasks at once, which takes some seconds.
    """
    if cpus < _MIN_SHARED_CPUS:
        return {spec.task.name: DecodeShare(cpus=min(1.0, cpus / len(specs))) for spec in specs}
    measure = ray.remote(num_cpus=1, max_retries=1)(_batch_cost_s)
    costs = ray.get([measure.remote(spec) for spec in specs])
    tasks = {spec.task.name: (spec.share, cost) for spec, cost in zip(specs, costs, strict=True)}
    return share_out(tasks, cpus=cpus, world_size=world_size)


def share_out(tasks: dict[str, tuple[float, float]], *, cpus: float, world_size: int = 1) -> dict[str, DecodeShare]:
    """Divides ``cpus`` by need, and a small part of them evenly. tasks: name → (share of steps, CPU s of a batch)."""
    need = {name: share * batch_s for name, (share, batch_s) in tasks.items()}
    total = sum(need.values()) or 1.0
    even = _EVEN_PART / len(tasks)
    return {
        name: DecodeShare(cpus=cpus * ((1 - _EVEN_PART) * need[name] / total + even), row_s=batch_s / world_size)
        for name, (_, batch_s) in tasks.items()
    }


def _batch_cost_s(spec: StreamSpec) -> float:
    try:
        return maker_of(spec).cost_s(spec.start)
    # The stream raises the same error, with a message that the user sees.
    except (DataError, RequestError):
        return MIN_BLOCK_S
