"""The streams of a run's tasks, from the run's spec and schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.data import DataIterator, Dataset
from ray.train import DataConfig

from pipeline.cluster.capacity import cluster_cpus
from pipeline.cluster.decode_shares import decode_shares
from pipeline.cluster.shared_rejects import shared
from pipeline.cluster.spec import Cluster
from pipeline.cluster.start import quiet_ray_data
from pipeline.cluster.streams import build_stream, iterate
from pipeline.data.known_rejects import NONE_KNOWN
from pipeline.data.stream_spec import StreamSpec
from pipeline.data.task_queue import TaskQueue, checked_rows
from pipeline.store.path import run_path
from pipeline.train.mixture.schedule import Schedule
from pipeline.train.quarantine import known_bad
from pipeline.train.spec import RunSpec

# Rows that a task's queue holds.
_QUEUE_ROWS = 2


def running_tasks(spec: RunSpec) -> list[str]:
    """The tasks that take part, in the order in which all ranks open their streams."""
    return sorted(spec.mixture.sampler.runs(spec.data.tasks))


def tasks_left(spec: RunSpec, schedule: Schedule) -> dict[str, tuple[int, int]]:
    """Task → the batches (start, stop) it has left from the schedule's start on; tasks without any are left out."""
    starts = schedule.batches_before(schedule.start)
    left = {name: (starts[name], schedule.batches_at_most(name)) for name in running_tasks(spec)}
    return {name: (start, stop) for name, (start, stop) in left.items() if start < stop}


def stream_spec(spec: RunSpec, cluster: Cluster, *, task: str, schedule: Schedule, bad: dict) -> StreamSpec:
    """The stream of one task from the schedule's start to the end of the run. bad: task → its rejects."""
    data_set = spec.data.data_sets[spec.data.tasks[task].data_set]
    return StreamSpec(
        task=spec.data.tasks[task],
        data_set=data_set,
        tokens=spec.data.tokens,
        tokenizer=spec.data.tokenizer,
        seed=spec.mixture.seed,
        fingerprint=spec.data.fingerprints[data_set.name],
        start=schedule.batches_before(schedule.start)[task],
        stop=schedule.batches_at_most(task),
        share=schedule.share(task),
        known_bad=bad.get(task, NONE_KNOWN),
        cache_bytes=cluster.cache_bytes,
        limits=cluster.limits,
    )


def build_streams(spec: RunSpec, cluster: Cluster, *, schedule: Schedule, world_size: int) -> dict[str, Dataset]:
    """Task → the stream of its batches from the schedule's start on; tasks that are done are left out."""
    bad = shared(known_bad(run_path(spec.run_dir)))
    wanted = [stream_spec(spec, cluster, task=name, schedule=schedule, bad=bad) for name in tasks_left(spec, schedule)]
    cpus = cluster_cpus() - cluster.trainer_cpus(world_size if cluster.num_workers else 0)
    shares = decode_shares(wanted, cpus=cpus, world_size=world_size)
    return {
        w.task.name: build_stream(w, world_size=world_size, options=cluster.decode, share=shares[w.task.name])
        for w in wanted
    }


def open_queues(
    streams: dict[str, Dataset] | dict[str, DataIterator],
    schedule: Schedule,
    *,
    rank: int = 0,
    end: Callable[[], None] = lambda: None,
) -> dict[str, TaskQueue]:
    """Task → the queue of its checked rows. end: wakes a thread that waits for a stream's next row."""
    starts = schedule.batches_before(schedule.start)
    queues = {}
    for task, stream in streams.items():
        rows = checked_rows(iterate(stream), task=task, start=starts[task], rank=rank)
        queues[task] = TaskQueue(rows, task=task, depth=_QUEUE_ROWS, end=end)
    return queues


def placeholders(spec: RunSpec) -> dict[str, Callable[[], Dataset]]:
    """A data set a task: Ray Train wants them up front. ``StreamConfig.configure`` puts the streams in their place."""
    return dict.fromkeys(running_tasks(spec), _placeholder)


def _placeholder() -> Dataset:
    return ray.data.range(1)


class StreamConfig(DataConfig):
    """Builds the tasks' streams at each start of the workers, when the world size and the checkpoint are known.

    Ray asks for one data set after another, and for each group of workers asks a copy of its own.
    """

    def __init__(self, spec: RunSpec, cluster: Cluster, coordinator: Any):
        super().__init__()
        self._spec = spec
        self._cluster = cluster
        self._coordinator = coordinator
        self._streams: dict[str, Dataset] | None = None

    def configure(
        self,
        datasets: dict[str, Dataset],
        world_size: int,
        worker_handles: list | None = None,
        worker_node_ids: list[str] | None = None,
        **kwargs: Any,
    ) -> list[dict[str, DataIterator]]:
        if self._streams is None:
            quiet_ray_data()
            step = ray.get(self._coordinator.starts_at.remote())
            schedule = self._spec.schedule(self._spec.position(step))
            self._streams = build_streams(self._spec, self._cluster, schedule=schedule, world_size=world_size)
        out: list[dict[str, DataIterator]] = [{} for _ in range(world_size)]
        for name in datasets:
            splits = self._streams[name].streaming_split(world_size, equal=True, locality_hints=worker_node_ids)
            for rank, split in enumerate(splits):
                out[rank][name] = split
        return out
