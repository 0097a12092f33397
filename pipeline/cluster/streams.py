"""One Ray Data stream a task.

Ray promises no order (see its iterators' documentation), so every row carries (task, batch, rank), and
``task_queue.checked_rows`` checks them on arrival.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
from ray.data import DataContext, DataIterator, Dataset, ExecutionOptions, ExecutionResources

from pipeline.cluster.capacity import uses_actors
from pipeline.cluster.decode_shares import DecodeShare
from pipeline.cluster.ray_input import dataset_of
from pipeline.cluster.scheduler_pause import ClusterSchedulerPause, SchedulerPause
from pipeline.cluster.spec import DecodeOptions
from pipeline.data.blocks import Blocks, block_bytes, rows_per_block
from pipeline.data.plan import Row
from pipeline.data.stream_spec import StreamSpec
from pipeline.data.wire import from_arrow

# Of ``map_batches``: a block as it is, not copied.
_WHOLE_BLOCKS = {"batch_size": None, "batch_format": "pyarrow", "zero_copy_batch": True}


class _BlockMaker:
    """What Ray calls to make a block: an instance in pooled tasks, the class in actors of a stream's own."""

    def __init__(self, blocks: Blocks):
        self._blocks = blocks

    def __call__(self, numbers: pa.Table) -> pa.Table:
        (number,) = numbers["id"].to_pylist()
        return self._blocks.table(number)


def build_stream(
    spec: StreamSpec, *, world_size: int, options: DecodeOptions, share: DecodeShare | None = None
) -> Dataset:
    """The lazily executed stream of one task for ``world_size`` ranks."""
    share, actors = share or DecodeShare(), uses_actors(options)
    rows = rows_per_block(spec, block_steps=options.block_steps, row_s=share.row_s)
    blocks = Blocks(spec, world_size=world_size, rows_per_block=rows)
    # Each decoder works on a block of its own.
    ahead = options.queue_blocks + share.num_decoders - 1
    with DataContext.current(_context(ahead_bytes=ahead * block_bytes(spec, rows), actors=actors)):
        return _actor_stream(blocks, share) if actors else _task_stream(blocks, share)


class _Numbers:
    """The numbers of a stream's blocks; the next one once a decoder is about to be free."""

    def __init__(self, count: int, *, num_decoders: int):
        self._count = count
        self._num_decoders = num_decoders
        self._next = 0

    def take(self, unfinished: int) -> pa.Table | None:
        if self.exhausted() or unfinished > self._num_decoders:
            return None
        self._next += 1
        return pa.table({"id": [self._next - 1]})

    def exhausted(self) -> bool:
        return self._next == self._count


def _task_stream(blocks: Blocks, share: DecodeShare) -> Dataset:
    numbers = dataset_of(_Numbers(blocks.num_blocks, num_decoders=share.num_decoders))
    return numbers.map_batches(_BlockMaker(blocks), num_cpus=1, concurrency=share.num_decoders, **_WHOLE_BLOCKS)


def _actor_stream(blocks: Blocks, share: DecodeShare) -> Dataset:
    # All streams must be able to start, whatever their number: actors ask for a part of a CPU.
    num_cpus = min(1.0, share.cpus / share.num_decoders)
    numbers = dataset_of(_Numbers(blocks.num_blocks, num_decoders=share.num_decoders))
    return numbers.map_batches(
        _BlockMaker,
        fn_constructor_args=(blocks,),
        concurrency=(1, share.num_decoders),
        num_cpus=num_cpus,
        max_restarts=3,
        max_task_retries=2,
        **_WHOLE_BLOCKS,
    )


def _context(*, ahead_bytes: int, actors: bool) -> DataContext:
    """Ray Data's settings for a stream: in order, and at most ``ahead_bytes`` ahead of its consumer.

    Without the bound one stream takes the CPUs that another waits for.
    """
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    # A block is one task's output: never split, never merged.
    context.target_max_block_size = None
    context.execution_options = ExecutionOptions(
        preserve_order=True, resource_limits=ExecutionResources(object_store_memory=max(ahead_bytes, 1 << 20))
    )
    context.custom_execution_callback_classes = [ClusterSchedulerPause if actors else SchedulerPause]
    return context


def iterate(stream: Dataset | DataIterator) -> Iterator[Row]:
    """The rows of a stream or of a rank's part of it, block by block."""
    # A queue pulls ahead of the feed: blocks need not be prefetched as well.
    for table in stream.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from from_arrow(table)
