"""Which block is decoded next: in the order in which the run's steps need them, within a budget of bytes."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import Protocol

import pyarrow as pa

from pipeline.data.blocks import Block
from pipeline.errors import DataError

# Seconds of one block after which the line on it says whether CPUs are free.
_LONG_S = 10.0
# Seconds for which a block may be decoded, if it holds more than one batch. Training sees nothing of it before its end.
_BLOCK_S = 10.0


class PlannedStep(Protocol):
    """One step of a run."""

    @property
    def task(self) -> str: ...

    @property
    def batch(self) -> int: ...


class Steps(Protocol):
    """The steps of a run, of which those below ``decided_until`` are known; a ``Schedule``."""

    @property
    def start(self) -> int: ...

    @property
    def num_steps(self) -> int: ...

    @property
    def decided_until(self) -> int: ...

    def __getitem__(self, step: int) -> PlannedStep: ...


@dataclasses.dataclass
class TaskBlocks:
    """One task's blocks.

    start, stop: its batches to make. share: its part of the run's steps. row_bytes: of one rank's part of a batch.
    taken: the first batch that no decoder was given yet. used: the first that training has not taken. ahead: blocks
    that were taken and hold batches that training has not taken. rows_in_time: batches that are decoded in time, by
    the last block that arrived.
    """

    name: str
    start: int
    stop: int
    share: float
    rows_per_block: int
    row_bytes: int
    taken: int = 0
    used: int = 0
    rows_in_time: int = 1
    ahead: deque[Block] = dataclasses.field(default_factory=deque)

    def __post_init__(self):
        self.taken = self.used = self.start

    def next_block(self, rank: int) -> Block:
        """The block to decode next: at first one batch, then up to as many as before, so that the first come soon."""
        size = min(self.taken - self.start + 1, self.rows_per_block, self.rows_in_time, self.stop - self.taken)
        return Block(self.name, self.taken, self.taken + size, rank)

    def note_time(self, block: Block, took_s: float) -> None:
        """Notes that a block has arrived, ``took_s`` after a decoder was given it."""
        batch_s = max(took_s / (block.stop - block.start), 1e-3)
        self.rows_in_time = max(1, int(_BLOCK_S / batch_s))

    def bytes_of(self, block: Block) -> int:
        return (block.stop - block.start) * self.row_bytes


@dataclasses.dataclass
class _Given:
    """A block that a decoder was given. since: when, by the monotonic clock. kept: of ``BlockOrder.keep``."""

    block: Block
    since: float
    kept: object = None


class Decoders(Protocol):
    """The decoders of a rank.

    num_decoders: the number that there are to be at the moment. max_unfinished: the number of blocks that they may have
    then. lack: a few words on the CPUs for them. wanted: CPUs to ask an autoscaler for.
    """

    @property
    def num_decoders(self) -> int: ...

    def max_unfinished(self) -> int: ...

    def note(self, unfinished: int, *, waits: bool) -> None: ...

    def lack(self) -> str: ...

    def wanted(self) -> int: ...


class BlockOrder:
    """The blocks of one rank: the ``Source`` of Ray Data's input, and the ``Order`` of the queues.

    A block whose decoding takes long, or whose rows are used late, keeps its bytes of the budget and no more. A row
    that training waits for is decoded whatever the budget, so that one too small for all tasks' blocks stops nothing.

    max_bytes: budget for blocks from the moment a decoder is given one until training has taken its last row.
    """

    def __init__(
        self,
        tasks: Iterable[TaskBlocks],
        steps: Steps,
        *,
        rank: int,
        max_bytes: int,
        decoders: Decoders,
    ):
        self.tasks = {task.name: task for task in tasks}
        self._steps = steps
        self._rank = rank
        self._max_bytes = max_bytes
        self._decoders = decoders
        self.starts = {name: task.start for name, task in self.tasks.items()}
        self.ended = False
        self.bytes_ahead = 0
        # The first step whose batch may not have been taken yet, and the task that training waits for.
        self._step = steps.start
        self._wanted: str | None = None
        self._waits = self._begun = False
        # By (task, first batch, rank): the blocks that have not arrived yet, the one taken last at the end.
        self._decoding: dict[tuple[str, int, int], _Given] = {}
        self._changed = threading.Condition()
        self._news = False

    # --- the decoders' side ---

    def take(self, unfinished: int) -> pa.Table | None:
        """The description of the block to decode next; None if none may start yet."""
        # Before the first row training waits for decoders to start, not for more of them.
        self._decoders.note(unfinished, waits=self._waits and self._begun)
        if self.ended or unfinished >= self._decoders.max_unfinished():
            return None
        with self._changed:
            task = self._next_task()
            if task is None:
                return None
            block = task.next_block(self._rank)
            needed = task.bytes_of(block)
            urgent = task.name == self._wanted and not task.ahead
            if self.bytes_ahead + needed > self._max_bytes and not urgent:
                return None
            task.taken = block.stop
            task.ahead.append(block)
            self.bytes_ahead += needed
            self._decoding[block.task, block.start, block.rank] = _Given(block, time.monotonic())
        return block.description()

    def keep(self, ref: object) -> None:
        """Keeps what the block taken last is made from until it has arrived: it may have to be made again."""
        with self._changed:
            self._decoding[next(reversed(self._decoding))].kept = ref

    def _next_task(self) -> TaskBlocks | None:
        """The task of the first step that lacks its batch. After the last step that is decided, the task with the
        smallest stock for its share, while it has less than a block."""
        until = self._steps.decided_until
        while self._step < until:
            step = self._steps[self._step]
            task = self.tasks[step.task]
            if step.batch >= task.taken:
                return task
            self._step += 1
        if self.exhausted():
            return None
        low = [t for t in self.tasks.values() if t.taken < t.stop and t.taken - t.used < t.rows_per_block]
        return min(low, key=lambda t: (t.taken - t.used) / max(t.share, 1e-9), default=None)

    def actors_wanted(self) -> int:
        """Number of actors that are to decode, where actors do."""
        return self._decoders.num_decoders

    def cpus_wanted(self) -> int:
        """CPUs to ask an autoscaler for."""
        return self._decoders.wanted()

    def exhausted(self) -> bool:
        """Whether every batch of the run was taken."""
        return self._step >= self._steps.num_steps

    def rest(self, timeout_s: float) -> None:
        """Waits until training has taken a row or wants one, at most ``timeout_s``."""
        with self._changed:
            self._changed.wait_for(lambda: self._news or self.ended, timeout_s)
            self._news = False

    # --- training's side ---

    def arrived(self, task: str, start: int, rank: int) -> Block:
        """Notes the arrival of the block that begins with batch ``start``. Raises DataError if none is due."""
        with self._changed:
            found = self._decoding.pop((task, start, rank), None)
            if found:
                self.tasks[task].note_time(found.block, time.monotonic() - found.since)
                return found.block
            due = ", ".join(f"{given.block.task} {given.block.start}" for given in self._decoding.values()) or "none"
        raise DataError(f"stream: expected one of the blocks {due} of rank {self._rank}, found {task, start, rank}")

    def want(self, task: str) -> None:
        """Notes that training waits for the task's next row."""
        with self._changed:
            self._wanted, self._waits, self._news = task, True, True
            self._changed.notify_all()

    def use(self, task: str) -> None:
        """Notes that training has taken the task's next row."""
        one = self.tasks[task]
        with self._changed:
            one.used += 1
            self._waits, self._begun = False, True
            if one.used >= one.ahead[0].stop:
                self.bytes_ahead -= one.bytes_of(one.ahead.popleft())
                self._news = True
                self._changed.notify_all()

    def held_up(self, task: str) -> str:
        """What the task's next row is waiting for, in words: its own block, or those that decoders have before it."""
        now = time.monotonic()
        with self._changed:
            decoding = list(self._decoding.values())
        own = [now - given.since for given in decoding if given.block.task == task]
        if own and max(own) < _LONG_S:
            return f"given to a decoder {max(own):.0f} s ago"
        if own:
            # It waits for a CPU, or decodes.
            return f"given to a decoder {max(own):.0f} s ago; {self._decoders.lack()}"
        others = sorted({given.block.task for given in decoding})
        return f"the decoders have {len(decoding)} blocks of {', '.join(others)}" if others else "no decoder has it yet"

    def end(self) -> None:
        """Ends the stream, and every wait for its next block."""
        with self._changed:
            self.ended = True
            self._changed.notify_all()
