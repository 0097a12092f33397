"""The rows of one stream alone, decoded by the cluster; for benchmarks and tests."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator

from pipeline.cluster.spec import Cluster
from pipeline.cluster.task_streams import queues_of
from pipeline.data.plan import Row
from pipeline.data.stream_spec import StreamSpec


@dataclasses.dataclass(frozen=True)
class OneTask:
    """The steps of a run of one task."""

    task: str
    start: int
    num_steps: int

    @property
    def decided_until(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> types.SimpleNamespace:
        return types.SimpleNamespace(task=self.task, batch=step)


def rows_of(spec: StreamSpec, cluster: Cluster | None = None, *, rank: int = 0, world_size: int = 1) -> Iterator[Row]:
    """All rows of a stream for one rank, in order."""
    name = spec.task.name
    steps = OneTask(name, spec.start, spec.stop)
    queues = queues_of({name: spec}, cluster or Cluster(), steps, rank=rank, world_size=world_size)
    try:
        for _ in range(spec.start, spec.stop):
            yield queues.next(name)
    finally:
        queues.close()
        queues.join(10.0)
