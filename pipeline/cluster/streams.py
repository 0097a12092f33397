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
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator

import numpy as np
import ray
import ray.data
from ray.data import DataContext, ExecutionOptions, ExecutionResources
from ray.data._internal.datasource.range_datasource import RangeDatasource
from ray.data._internal.execution.execution_callback import ExecutionCallback

from pipeline.cluster.spec import DecodeOptions
from pipeline.data.batches import BatchMaker, SampleMaker
from pipeline.data.media.process import DecodeLimits
from pipeline.data.plan import Row, TaskPlan
from pipeline.data.shards import open_source
from pipeline.data.spec import DataSetSpec, TaskSpec, TokenSpec
from pipeline.data.tokenizer import Tokenizer
from pipeline.data.wire import failure_to_arrow, from_arrow, to_arrow
from pipeline.errors import DataError, RequestError
from pipeline.host_memory import keep_freed_memory

_MOST_BLOCK_BYTES = 64 << 20
# Ray Data spends some 20 ms on a block, whatever it holds.
_FEWEST_BLOCK_S = 0.25
_ACTOR_CPUS = 8
# With fewer CPUs each stream has one decoder at a time, and there is nothing to share out.
_SHARED_CPUS = 3


@dataclasses.dataclass(frozen=True)
class StreamSpec:
    """All a decode process needs to make the batches of one task. Travels by Ray's own serialisation.

    fingerprint: of the data set's rows as the run knows them (``columns.Fingerprint.digests``): every process compares
    its own. start, stop: the task's batches to make. share: of the run's steps, the part that is this task's.
    known_bad: rejects of an earlier part of the run, by ``plan.reject_key``.
    """

    task: TaskSpec
    data_set: DataSetSpec
    tokens: TokenSpec
    tokenizer: bytes | None
    seed: int
    fingerprint: dict
    start: int
    stop: int
    share: float
    known_bad: dict[str | tuple[int, int], dict]
    cache_bytes: int
    limits: DecodeLimits = dataclasses.field(default_factory=DecodeLimits)
    key: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)

    def maker(self) -> BatchMaker:
        """Raises RequestError where this process reads other rows than the run began with."""
        num_rows = self.fingerprint["num_rows"]
        plan = TaskPlan(self.task, seed=self.seed, num_rows=num_rows, num_batches=self.stop)
        media = tuple(m for m in self.task.modalities if m != "text")
        source = open_source(self.data_set, modalities=media, cache_bytes=self.cache_bytes, limits=self.limits)
        if source.fingerprint != self.fingerprint:
            raise RequestError(
                f"data_sets.{self.data_set.name}: a machine of the run reads other rows than the run started with; all "
                "machines must see the same manifest or shards, unchanged as long as the run goes on"
            )
        tokenizer = Tokenizer(self.tokenizer) if self.tokenizer else None
        samples = SampleMaker(self.task, self.data_set, source=source, tokenizer=tokenizer, tokens=self.tokens)
        return BatchMaker(plan, samples, known_bad=self.known_bad)


# Pooled tasks keep their decoders here: one maker a stream and process, built at its first block.
_MAKERS: dict[str, BatchMaker] = {}


def _maker(spec: StreamSpec) -> BatchMaker:
    if spec.key not in _MAKERS:
        keep_freed_memory(4 * _MOST_BLOCK_BYTES)
        _MAKERS[spec.key] = spec.maker()
    return _MAKERS[spec.key]


def _make_block(spec: StreamSpec, rows: list[tuple[int, int]], world_size: int):
    maker = _maker(spec)
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
        try:
            return _make_block(self.spec, [(batch, rank) for batch in batches], self.world_size)
        except (DataError, RequestError) as e:
            return failure_to_arrow(e)


class StreamEnded(Exception):
    """A stream ends because nobody wants its rows any more."""


# Of the streams whose loops run in this process.
_PACES: weakref.WeakSet[Pace] = weakref.WeakSet()


def end_streams() -> None:
    """Ends the loops of all streams that run in this process."""
    for pace in list(_PACES):
        pace.ended = True


class Pace(ExecutionCallback):
    """Rests between the steps of a stream's scheduling loop.

    That loop spins without a pause while the stream is as far ahead as it may be: nine resting streams took a whole
    core and the interpreter lock of the trainer beside them (ray 2.60). While a task runs the loop waits for it, and
    spins only where its output may not be read yet.
    """

    idle_s, busy_s = 0.2, 0.02
    ended = False

    def before_execution_starts(self, executor) -> None:
        _PACES.add(self)

    def on_execution_step(self, executor) -> None:
        if self.ended:
            # Ends the loop, and with it whoever waits for the stream's next block.
            raise StreamEnded
        busy = any(operator.num_active_tasks() for operator in executor._topology)
        time.sleep(self.busy_s if busy else self.idle_s)


class ClusterPace(Pace):
    """On a cluster each stream's loop has a process of its own, and blocks come faster."""

    idle_s, busy_s = 0.01, 0.0


class _DecodeActor:
    """The same work in a long-lived actor of its own."""

    def __init__(self, blocks: _Blocks):
        self.blocks = blocks

    def __call__(self, batch):
        return self.blocks(batch)


@dataclasses.dataclass(frozen=True)
class DecodeShare:
    """What one stream gets of the CPUs. row_s: CPU seconds of one of its rows, where they were measured."""

    cpus: float = 1.0
    row_s: float | None = None

    @property
    def num_decoders(self) -> int:
        return max(1, round(self.cpus))


def decode_shares(specs: list[StreamSpec], *, cpus: float, world_size: int = 1) -> dict[str, DecodeShare]:
    """Task → its share of ``cpus``: by how many steps it has and what a batch of it was measured to cost.

    The measuring runs in the cluster, all tasks at once, and takes some seconds.
    """
    if cpus < _SHARED_CPUS:
        return {spec.task.name: DecodeShare(cpus=min(1.0, cpus / len(specs))) for spec in specs}
    measure = ray.remote(num_cpus=1, max_retries=1)(_batch_cost_s)
    batch_s = dict(zip([s.task.name for s in specs], ray.get([measure.remote(s) for s in specs]), strict=True))
    return share_out({s.task.name: (s.share, batch_s[s.task.name]) for s in specs}, cpus=cpus, world_size=world_size)


def share_out(tasks: dict[str, tuple[float, float]], *, cpus: float, world_size: int = 1) -> dict[str, DecodeShare]:
    """tasks: name → (share of the steps, CPU seconds of a batch). A tenth of the CPUs is dealt out evenly."""
    need = {name: share * batch_s for name, (share, batch_s) in tasks.items()}
    total = sum(need.values()) or 1.0
    return {
        name: DecodeShare(cpus=cpus * (0.9 * need[name] / total + 0.1 / len(tasks)), row_s=batch_s / world_size)
        for name, (_, batch_s) in tasks.items()
    }


def _batch_cost_s(spec: StreamSpec) -> float:
    try:
        return _maker(spec).cost_s(spec.start)
    # Data that stop the run say so in its stream, where the reason reaches the user.
    except (DataError, RequestError):
        return _FEWEST_BLOCK_S


def rows_per_block(spec: StreamSpec, *, block_steps: int, row_s: float | None = None) -> int:
    """Batches a block: as many as ``block_steps`` steps of the run use of this task, below a bound in bytes.

    Ray serves the streams in turn, one block each, so blocks that last equally long give each stream its due. Where the
    cost of a row is known, a block is worth its own.
    """
    worth = round(spec.share * block_steps)
    if row_s:
        worth = max(worth, int(np.ceil(_FEWEST_BLOCK_S / row_s)))
    return max(1, min(worth, _MOST_BLOCK_BYTES // block_bytes(spec, 1)))


def build_stream(
    spec: StreamSpec, *, world_size: int, options: DecodeOptions, share: DecodeShare | None = None
) -> ray.data.Dataset:
    """The lazily executed stream of one task for ``world_size`` ranks."""
    share = share or DecodeShare()
    rows = rows_per_block(spec, block_steps=options.block_steps, row_s=share.row_s)
    blocks = _Blocks(spec, world_size=world_size, rows_per_block=rows)
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    # A block is one task's output as it stands: never cut, never merged.
    context.target_max_block_size = None
    # Each decoder works on a block of its own.
    ahead = options.queue_blocks + share.num_decoders - 1
    context.execution_options = execution_options(ahead_bytes=ahead * block_bytes(spec, rows))
    actors = uses_actors(options)
    context.custom_execution_callback_classes = [ClusterPace if actors else Pace]
    with DataContext.current(context):
        # Alike in CPUs and number, reading and decoding become one operator: a block is one task. All streams must be
        # able to start, however many they are: actors ask for a part of a CPU.
        num_cpus = min(1.0, share.cpus / share.num_decoders) if actors else 1
        source = ray.data.read_datasource(
            RangeDatasource(blocks.num_blocks, "arrow", column_name="id"),
            override_num_blocks=blocks.num_blocks,
            num_cpus=num_cpus,
            concurrency=None if actors else share.num_decoders,
        )
        common = {"batch_size": None, "batch_format": "pyarrow", "zero_copy_batch": True, "num_cpus": num_cpus}
        if actors:
            return source.map_batches(
                _DecodeActor,
                fn_constructor_args=(blocks,),
                concurrency=(1, share.num_decoders),
                max_restarts=3,
                max_task_retries=2,
                **common,
            )
        return source.map_batches(blocks, concurrency=share.num_decoders, **common)


def uses_actors(options: DecodeOptions) -> bool:
    """Whether streams keep actors of their own."""
    return options.mode == "actors" or (options.mode == "auto" and cluster_cpus() >= _ACTOR_CPUS)


def cluster_cpus() -> float:
    """CPUs of all machines."""
    return ray.cluster_resources().get("CPU", 1.0)


def block_bytes(spec: StreamSpec, rows: int) -> int:
    """Size of a full block: every task moves about its vision tokens and its spectrograms."""
    frames, height, width = spec.tokens.vision_patch
    audio = 4 * spec.data_set.audio.num_frames * spec.data_set.audio.num_mels
    sizes = [
        v.global_batch_size
        * (
            v.num_vision_tokens * 3 * height * width * (frames if v.num_frames else 1)
            + audio * ("audio" in spec.task.modalities)
        )
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
    """The queue of one task: a thread pulls the stream's rows ahead of the feed, at most ``depth`` of them.

    end: called by ``close`` to wake a thread that waits for the stream's next row.
    """

    def __init__(self, rows: Iterable[Row], *, task: str, depth: int, end: Callable[[], None] = lambda: None):
        self._rows, self._depth, self._end, self._ready = rows, depth, end, []
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
            # In this thread, which ``join`` waits for: a stream that is left half read ends what it has started.
            if isinstance(self._rows, Generator):
                self._rows.close()

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
        """No more rows: wakes whoever waits for one. ``join`` then waits for the thread."""
        with self._condition:
            self._done = True
            self._ready.clear()
            self._condition.notify_all()

    def join(self, timeout_s: float) -> bool:
        """Whether the thread has ended, within ``timeout_s``: after that nothing calls Ray for this queue."""
        deadline = time.monotonic() + timeout_s
        while self._thread.is_alive():
            # Again and again: a stream may only just be starting.
            self._end()
            self._thread.join(timeout=0.1)
            if time.monotonic() >= deadline:
                break
        return not self._thread.is_alive()
