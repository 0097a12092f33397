"""The streams of a run's tasks, from the run's spec and schedule."""

from __future__ import annotations

from pipeline.cluster.block_order import BlockOrder, Steps, TaskBlocks
from pipeline.cluster.capacity import DecodeCpus, bytes_ahead, uses_actors
from pipeline.cluster.spec import Cluster
from pipeline.cluster.streams import decoded
from pipeline.data.blocks import bytes_of_row, rows_per_block
from pipeline.data.known_rejects import NONE_KNOWN, KnownRejects
from pipeline.data.stream_spec import StreamSpec
from pipeline.data.task_queue import TaskQueue, TaskQueues
from pipeline.train.mixture.schedule import Schedule
from pipeline.train.spec import RunSpec


def tasks_left(spec: RunSpec, schedule: Schedule) -> dict[str, tuple[int, int]]:
    """Task → the batches (start, stop) it has left from the schedule's start on; tasks without any are left out."""
    starts = schedule.batches_before(schedule.start)
    running = spec.mixture.sampler.runs(spec.data.tasks)
    left = {name: (starts[name], schedule.batches_at_most(name)) for name in running}
    return {name: (start, stop) for name, (start, stop) in left.items() if start < stop}


def stream_spec(
    spec: RunSpec, cluster: Cluster, *, task: str, schedule: Schedule, bad: dict[str, KnownRejects]
) -> StreamSpec:
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


def open_queues(
    spec: RunSpec,
    cluster: Cluster,
    schedule: Schedule,
    *,
    bad: dict[str, KnownRejects],
    rank: int = 0,
    world_size: int = 1,
    ranks_here: int = 1,
) -> dict[str, TaskQueue]:
    """Task → the queue of a rank's rows from the schedule's start on; tasks that are done are left out.

    bad: task → rejects of an earlier part of the run, the same for every rank. ranks_here: on this machine.
    """
    specs = {
        name: stream_spec(spec, cluster, task=name, schedule=schedule, bad=bad) for name in tasks_left(spec, schedule)
    }
    if not specs:
        return {}
    return queues_of(specs, cluster, schedule, rank=rank, world_size=world_size, ranks_here=ranks_here).by_task


def queues_of(
    specs: dict[str, StreamSpec],
    cluster: Cluster,
    steps: Steps,
    *,
    rank: int = 0,
    world_size: int = 1,
    ranks_here: int = 1,
) -> TaskQueues:
    """The queues of these streams, filled in the order in which the steps need their rows.

    ranks_here: ranks on this machine.
    """
    cpus, budget = DecodeCpus(cluster, world_size), bytes_ahead(cluster, world_size, ranks_here=ranks_here)
    # Two blocks of each task fit: one that is used, and the next.
    max_block = budget // (2 * len(specs))
    tasks = [_task_blocks(one, cluster, world_size=world_size, max_bytes=max_block) for one in specs.values()]
    order = BlockOrder(tasks, steps, rank=rank, max_bytes=budget, decoders=cpus)
    tables = decoded(
        order,
        specs,
        world_size=world_size,
        actors=cpus.num_decoders if uses_actors(cluster.decode) else None,
        num_cpus=cpus.each,
    )
    return TaskQueues(tables, order)


def _task_blocks(spec: StreamSpec, cluster: Cluster, *, world_size: int, max_bytes: int) -> TaskBlocks:
    row = bytes_of_row(spec, world_size=world_size)
    rows = rows_per_block(spec, block_steps=cluster.decode.block_steps, row_bytes=row, max_bytes=max_bytes)
    return TaskBlocks(spec.task.name, spec.start, spec.stop, spec.share, rows_per_block=rows, row_bytes=row)
