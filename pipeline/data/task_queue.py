"""The queues of all tasks between a stream of blocks and the feed."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

import pyarrow as pa

from pipeline.data.blocks import Block
from pipeline.data.plan import Arrival, Row
from pipeline.data.wire import first_of, from_arrow
from pipeline.errors import DataError, RequestError


class Order(Protocol):
    """What is decoded, and how far ahead.

    starts: task → its first batch. bytes_ahead: of blocks that training has not used up.
    """

    starts: Mapping[str, int]
    bytes_ahead: int

    def arrived(self, task: str, start: int, rank: int) -> Block:
        """Notes the arrival of the block that begins with batch ``start``. Raises DataError if none is due."""

    def want(self, task: str) -> None:
        """Notes that training waits for the task's next row."""

    def use(self, task: str) -> None:
        """Notes that training has taken the task's next row."""

    def held_up(self, task: str) -> str:
        """What the task's next row is waiting for, in words."""

    def end(self) -> None:
        """Ends the stream, and every wait for its next block."""


class Fetched(NamedTuple):
    """A decoded block that is here."""

    table: pa.Table
    arrival: Arrival


# A block's rows, or its error alone, each with the arrival of the block.
_Rows = list[tuple[Row | BaseException, Arrival]]


def checked_rows(rows: Iterable[Row], block: Block) -> Iterator[Row]:
    """Passes the rows on. Raises DataError at one that is not the next one of this block, and if one is missing."""
    found: list = []
    for row in rows:
        found.append((row.task, row.batch, row.rank))
        expected = (block.task, block.start + len(found) - 1, block.rank)
        if found[-1] != expected or expected[1] >= block.stop:
            raise DataError(f"stream of {block.task}: expected {expected} of block {block}, found {found[-1]}")
        yield row
    if len(found) != block.stop - block.start:
        raise DataError(f"stream of {block.task}: expected {block.stop - block.start} rows of {block}, found {found}")


class TaskQueues:
    """A thread that takes the blocks of a stream as they come; each task's rows in their order.

    blocks: decoded, in whatever order they are ready; how many there may be is up to ``order``.
    """

    def __init__(self, blocks: Iterable[Fetched], order: Order):
        self._blocks = blocks
        self.order = order
        self._condition = threading.Condition()
        # By task: the batch that its queue gets next, blocks of later ones by their first batch, and rows to give out.
        self._due = dict(order.starts)
        self._early: dict[str, dict[int, tuple[Block, _Rows]]] = {task: {} for task in order.starts}
        self._ready: dict[str, deque[tuple[Row | BaseException, Arrival]]] = {task: deque() for task in order.starts}
        # By task: of the row that was taken last.
        self._arrivals: dict[str, Arrival] = {}
        self._failure: BaseException = DataError("the stream ended before the run did")
        self._over = False
        self._thread = threading.Thread(target=self._pull, name="streams", daemon=True)
        self._thread.start()

    @property
    def by_task(self) -> dict[str, TaskQueue]:
        """Task → its queue."""
        return {task: TaskQueue(self, task) for task in self._due}

    def _pull(self) -> None:
        try:
            for block in self._blocks:
                self._sort_in(block)
                if self._over:
                    return
        except BaseException as e:
            self._failure = e
        finally:
            with self._condition:
                self._over = True
                self._condition.notify_all()
            # In this thread, which ``join`` waits for: a stream left half read ends what it has started.
            if isinstance(self._blocks, Generator):
                self._blocks.close()

    def _sort_in(self, found: Fetched) -> None:
        """Puts a block's rows into its task's queue, once those of all earlier batches are there."""
        block = self.order.arrived(*first_of(found.table))
        rows: _Rows
        try:
            rows = [(row, found.arrival) for row in checked_rows(from_arrow(found.table), block)]
        except (DataError, RequestError) as e:
            rows = [(e, found.arrival)]
        with self._condition:
            early, ready = self._early[block.task], self._ready[block.task]
            early[block.start] = block, rows
            while next_one := early.pop(self._due[block.task], None):
                self._due[block.task] = next_one[0].stop
                ready.extend(next_one[1])
            self._condition.notify_all()

    def next(self, task: str) -> Row:
        """Waits for the task's next row. Raises what its block, or the stream, raised."""
        with self._condition:
            ready = self._ready[task]
            if not ready:
                self.order.want(task)
                self._condition.wait_for(lambda: ready or self._over)
            if not ready:
                raise self._failure
            row, self._arrivals[task] = ready[0]
            if isinstance(row, BaseException):
                raise row
            ready.popleft()
        self.order.use(task)
        return row

    def arrival(self, task: str) -> Arrival:
        """Of the block of the task's row that was taken last."""
        return self._arrivals[task]

    def close(self) -> None:
        """Drops the rows and wakes every thread that waits for one. ``join`` then waits for the own thread."""
        with self._condition:
            self._over = True
            for ready in self._ready.values():
                ready.clear()
            self._condition.notify_all()
        self.order.end()

    def join(self, timeout_s: float) -> bool:
        """Whether the thread ended within ``timeout_s``: after that nothing calls Ray for these queues."""
        self._thread.join(timeout=timeout_s)
        return not self._thread.is_alive()


class TaskQueue:
    """The queue of one task. All of a run are closed together."""

    def __init__(self, queues: TaskQueues, task: str):
        self._queues = queues
        self._task = task

    def next(self) -> Row:
        """Waits for the next row."""
        return self._queues.next(self._task)

    def arrival(self) -> Arrival:
        """When the row that was taken last was decoded, and was here."""
        return self._queues.arrival(self._task)

    def awaits(self) -> str:
        """What the next row is waiting for, in words."""
        return self._queues.order.held_up(self._task)

    def close(self) -> None:
        """Ends the queues and wakes whoever waits in ``next``."""
        self._queues.close()

    def join(self, timeout_s: float) -> bool:
        """Waits for the thread that fills the queues, at most ``timeout_s``. Returns whether it has ended."""
        return self._queues.join(timeout_s)
