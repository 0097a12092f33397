"""Decodes the blocks of all tasks of a rank in one execution of Ray Data."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, ExecutionOptions, TaskPoolStrategy

from pipeline.cluster.fetching import fetched
from pipeline.cluster.ray_input import Source, blocks_of, dataset_of
from pipeline.cluster.scheduler_pause import SchedulerPause
from pipeline.data.blocks import Block, make_block
from pipeline.data.stream_spec import StreamSpec
from pipeline.data.task_queue import Fetched

# Of ``map_batches``: a block as it is, not copied; decoded on the rank's own machine first, if it has CPUs to spare.
_WHOLE_BLOCKS = {
    "batch_size": None,
    "batch_format": "pyarrow",
    "zero_copy_batch": True,
    "scheduling_strategy": "DEFAULT",
}

# The streams that this process decodes for, by the object that holds them: read once, not for every block.
_SPECS: dict[str, dict[str, StreamSpec]] = {}


class Decoder:
    """What Ray calls to decode a block: an instance in pooled tasks, the class in actors.

    specs: an object of Ray's that holds the stream of each task.
    """

    def __init__(self, specs: ray.ObjectRef, world_size: int):
        self._specs = specs
        self._world_size = world_size

    def __call__(self, description: pa.Table) -> pa.Table:
        block = Block.described(description)
        specs = _SPECS.get(self._specs.hex())
        if specs is None:
            specs = _SPECS[self._specs.hex()] = ray.get(self._specs)
        return make_block(specs[block.task], block, world_size=self._world_size)


def decoded(
    source: Source, specs: dict[str, StreamSpec], *, world_size: int, actors: int | None, num_cpus: float
) -> Iterator[Fetched]:
    """The blocks of a source, each as soon as it is decoded and here. Ends the source when it is closed.

    actors: size of a pool of actors at first; None decodes in pooled tasks. num_cpus: of one decoder.
    """
    for spec in specs.values():
        # Kept in the instance, and so computed here alone.
        _ = spec.key
    given = (ray.put(specs), world_size)
    with DataContext.current(_context()):
        dataset = dataset_of(source)
        stream = _by_tasks(dataset, given, num_cpus) if actors is None else _by_actors(dataset, given, actors, num_cpus)
    return fetched(blocks_of(stream), end=source.end)


def _by_tasks(dataset: Dataset, given: tuple, num_cpus: float) -> Dataset:
    return dataset.map_batches(Decoder(*given), compute=TaskPoolStrategy(), num_cpus=num_cpus, **_WHOLE_BLOCKS)


def _by_actors(dataset: Dataset, given: tuple, actors: int, num_cpus: float) -> Dataset:
    return dataset.map_batches(
        Decoder,
        fn_constructor_args=given,
        # At first; later as many as the source wants.
        compute=ActorPoolStrategy(size=actors),
        num_cpus=num_cpus,
        # Without a bound: until Ray notices that a machine is gone, each second holds several tries at its actors.
        # Media cannot end an actor, only its child; what else may do so at every try, the watchdog ends.
        max_restarts=-1,
        max_task_retries=-1,
        **_WHOLE_BLOCKS,
    )


def _context() -> DataContext:
    """Ray Data's settings for a stream. How far it is ahead is up to its source alone."""
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    # A thread in every task that would look at its memory.
    context.memory_usage_poll_interval_s = None
    # A block is one task's output: never split, never merged.
    context.target_max_block_size = None
    # In whatever order blocks are ready: a slow one holds up its own task alone. ``TaskQueues`` puts them in order.
    context.execution_options = ExecutionOptions(preserve_order=False)
    context.set_config("backpressure_policies.enabled", [])
    context.custom_execution_callback_classes = [SchedulerPause]
    return context
