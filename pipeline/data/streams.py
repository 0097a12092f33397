"""One Ray Data stream a task: the only file of the data layer that knows Ray.

A stream is a finite list of blocks. A block holds consecutive batches of one rank, and blocks are dealt to the ranks
in order, so block b belongs to rank b mod world_size. Ray promises no order here (its iterator docs), so every row
carries (task, batch, rank) and ``checked_rows`` checks them on arrival.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
import uuid
from collections.abc import Iterable, Iterator

import numpy as np
import ray
import ray.data
from ray.data import DataContext, ExecutionOptions, ExecutionResources
from ray.data._internal.execution.execution_callback import ExecutionCallback

from pipeline.data.batches import BatchMaker, SampleMaker
from pipeline.data.plan import Row, TaskPlan
from pipeline.data.shards import open_source
from pipeline.data.spec import DataSetSpec, TaskSpec, TokenSpec
from pipeline.data.text import Tokenizer
from pipeline.data.wire import from_arrow, to_arrow
from pipeline.errors import DataError

_MOST_BLOCK_BYTES = 64 << 20
_ACTOR_CPUS = 8


@dataclasses.dataclass(frozen=True)
class StreamSpec:
    """All a decode process needs to make the batches of one task. Travels by Ray's own serialisation.

    start, stop: the task's batches to make. share: of the run's steps, the part that is this task's.
    known_bad: rejects of an earlier part of the run, by id.
    """

    task: TaskSpec
    data_set: DataSetSpec
    tokens: TokenSpec
    tokenizer: bytes | None
    seed: int
    num_rows: int
    start: int
    stop: int
    share: float
    known_bad: dict[str, dict]
    cache_bytes: int
    key: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)

    def maker(self) -> BatchMaker:
        plan = TaskPlan(self.task, seed=self.seed, num_rows=self.num_rows, num_batches=self.stop)
        media = tuple(m for m in self.task.modalities if m != "text")
        source = open_source(self.data_set, modalities=media, cache_bytes=self.cache_bytes)
        tokenizer = Tokenizer(self.tokenizer) if self.tokenizer else None
        samples = SampleMaker(self.task, self.data_set, source=source, tokenizer=tokenizer, tokens=self.tokens)
        return BatchMaker(plan, samples, known_bad=self.known_bad)


@dataclasses.dataclass(frozen=True)
class DecodeOptions:
    """How decode runs: "tasks", "actors" or "auto"; steps of the run a block is for; blocks a stream may be ahead."""

    mode: str = "auto"
    block_steps: int = 16
    queue_blocks: int = 1


# Pooled tasks keep their decoders here: one maker a stream and process, built at its first block.
_MAKERS: dict[str, BatchMaker] = {}


def _make_block(spec: StreamSpec, rows: list[tuple[int, int]], world_size: int):
    if spec.key not in _MAKERS:
        _MAKERS[spec.key] = spec.maker()
    maker = _MAKERS[spec.key]
    return to_arrow([maker.row(batch, rank=rank, world_size=world_size) for batch, rank in rows])


class _Blocks:
    """The stream's arithmetic: which (batch, rank) rows block ``b`` holds.

    A turn gives each rank one block of the same batches. The first turns are small and double up to
    ``rows_per_block``, so that the first batch of a stream does not wait for a whole block.
    """

    def __init__(self, spec: StreamSpec, *, world_size: int, rows_per_block: int):
        self.spec, self.world_size = spec, world_size
        edges, size = [spec.start], 1
        while edges[-1] < spec.stop:
            edges.append(min(edges[-1] + size, spec.stop))
            size = min(2 * size, rows_per_block)
        self.edges = np.asarray(edges)
        self.num_blocks = (len(edges) - 1) * world_size

    def __call__(self, blocks):
        (block,) = blocks["id"].to_pylist()  # one id a read task
        turn, rank = divmod(block, self.world_size)
        batches = range(int(self.edges[turn]), int(self.edges[turn + 1]))
        return _make_block(self.spec, [(batch, rank) for batch in batches], self.world_size)


class Pace(ExecutionCallback):
    """Rests between the steps of a stream's scheduling loop.

    That loop spins without a pause while the stream is as far ahead as it may be: nine resting streams took a whole
    core and the interpreter lock of the trainer beside them (ray 2.60). A stream needs a few steps a block.
    """

    rest_s = 0.2

    def on_execution_step(self, executor) -> None:
        time.sleep(self.rest_s)


class ClusterPace(Pace):
    """On a cluster each stream's loop has a process of its own, and blocks come faster."""

    rest_s = 0.01


class _DecodeActor:
    """The same work in a long-lived actor of its own."""

    def __init__(self, blocks: _Blocks):
        self.blocks = blocks

    def __call__(self, batch):
        return self.blocks(batch)


def rows_per_block(spec: StreamSpec, *, block_steps: int) -> int:
    """Batches a block: as many as ``block_steps`` steps of the run use of this task, below a bound in bytes.

    Ray serves the streams in turn, one block each, so blocks that last equally long give each stream its due.
    """
    return max(1, min(round(spec.share * block_steps), _MOST_BLOCK_BYTES // block_bytes(spec, 1)))


def build_stream(spec: StreamSpec, *, world_size: int, options: DecodeOptions) -> ray.data.Dataset:
    """The lazily executed stream of one task for ``world_size`` ranks."""
    rows = rows_per_block(spec, block_steps=options.block_steps)
    blocks = _Blocks(spec, world_size=world_size, rows_per_block=rows)
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    # A block is one task's output as it stands: never cut, never merged.
    context.target_max_block_size = None
    context.execution_options = execution_options(ahead_bytes=options.queue_blocks * block_bytes(spec, rows))
    actors = options.mode == "actors" or (options.mode == "auto" and _cluster_cpus() >= _ACTOR_CPUS)
    context.custom_execution_callback_classes = [ClusterPace if actors else Pace]
    with DataContext.current(context):
        source = ray.data.range(blocks.num_blocks, override_num_blocks=blocks.num_blocks)
        common = {"batch_size": None, "batch_format": "pyarrow", "zero_copy_batch": True}
        if actors:
            return source.map_batches(
                _DecodeActor,
                fn_constructor_args=(blocks,),
                concurrency=(1, 4),
                num_cpus=1,
                max_restarts=3,
                max_task_retries=2,
                **common,
            )
        return source.map_batches(blocks, concurrency=1, num_cpus=1, **common)


def _cluster_cpus() -> float:
    return ray.cluster_resources().get("CPU", 1.0)


def block_bytes(spec: StreamSpec, rows: int) -> int:
    """Size of a full block: every task moves about its vision tokens and its spectrograms."""
    patch = 3 * int(np.prod(spec.tokens.vision_patch))
    audio = 4 * spec.data_set.audio.num_frames * spec.data_set.audio.num_mels
    sizes = [
        v.global_batch_size * (v.num_vision_tokens * patch + audio * ("audio" in spec.task.modalities))
        for v in spec.task.variants
    ]
    return rows * max(sizes)


def execution_options(*, ahead_bytes: int) -> ExecutionOptions:
    """In order, and only so far ahead of the consumer: otherwise one stream takes the CPUs that another waits for."""
    return ExecutionOptions(
        preserve_order=True, resource_limits=ExecutionResources(object_store_memory=max(ahead_bytes, 1 << 20))
    )


def iterate(dataset, *, prefetch_blocks: int = 0) -> Iterator[Row]:
    """The rows of a stream (Dataset or a rank's DataIterator), block by block."""
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=prefetch_blocks):
        yield from from_arrow(table)


def checked_rows(rows: Iterable[Row], *, task: str, start: int, rank: int) -> Iterator[Row]:
    """Passes the rows on, or raises DataError at the first that is not the next of this task and rank."""
    for expected, row in enumerate(rows, start):
        found = (row.task, row.batch, row.rank)
        if found != (task, expected, rank):
            raise DataError(f"stream of {task}: expected batch {expected} for rank {rank}, found {found}")
        yield row


def quiet_ray_data() -> None:
    """Ray Data announces every execution; a run has one a task."""
    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.ERROR)


class TaskQueue:
    """The queue of one task: a thread pulls the stream's rows ahead of the feed, at most ``depth`` of them."""

    def __init__(self, rows: Iterable[Row], *, task: str, depth: int):
        self._rows, self._depth, self._ready = rows, depth, []
        self._condition, self._failure, self._done = threading.Condition(), None, False
        self._thread = threading.Thread(target=self._pull, name=f"stream-{task}", daemon=True)
        self._thread.start()

    def _pull(self) -> None:
        try:
            for row in self._rows:
                with self._condition:
                    self._condition.wait_for(lambda: self._done or len(self._ready) < self._depth)
                    if self._done:
                        return
                    self._ready.append(row)
                    self._condition.notify_all()
        except BaseException as e:
            self._failure = e
        finally:
            with self._condition:
                self._done = True
                self._condition.notify_all()

    def next(self) -> Row:
        """The next row; blocks until it is there. Raises what the stream raised."""
        with self._condition:
            self._condition.wait_for(lambda: self._ready or self._done)
            if self._ready:
                row = self._ready.pop(0)
                self._condition.notify_all()
                return row
        if self._failure is not None:
            raise self._failure
        raise DataError("the stream ended before the run did")

    def close(self) -> None:
        with self._condition:
            self._done = True
            self._ready.clear()
            self._condition.notify_all()
