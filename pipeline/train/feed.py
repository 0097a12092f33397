"""The feed knows the schedule ahead: it pulls from the queue of the task that the sampler chose, journals what was
rejected, and puts the next batches on the device while the current step runs."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from pipeline.data.plan import Row, group_arrays
from pipeline.errors import DataError
from pipeline.train.chance import chance_of
from pipeline.train.mixture.schedule import Schedule, Step
from pipeline.train.quarantine import Quarantine
from pipeline.train.step_gate import Gate

_DEPTH = 2
# Seconds for the thread to end, which may be putting a batch on a device, and for those of all queues.
_JOIN_S = 5.0


class RowQueue(Protocol):
    """The rows of one task in order."""

    def next(self) -> Row: ...

    def close(self) -> None:
        """Wakes whoever waits in ``next``; nothing comes any more."""

    def join(self, timeout_s: float) -> bool:
        """Waits for what fills the queue, at most ``timeout_s``. Returns whether it has ended."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """One step's batch on the device. ids: this process's samples. chance: the loss of guessing (``chance_of``)."""

    step: int
    what: Step
    arrays: dict
    ids: list[str]
    chance: float


class Feed:
    """Iterates over the batches of the steps start .. stop - 1, in order.

    put: local arrays → global arrays on the devices. gate: is told of every batch that is there, and of the one that
    cannot be made. waits_for: the task whose stream the feed waits for at the moment.
    """

    def __init__(
        self,
        schedule: Schedule,
        queues: Mapping[str, RowQueue],
        *,
        start: int,
        stop: int,
        put: Callable[[dict], dict],
        quarantine: Quarantine,
        gate: Gate,
    ):
        self._schedule, self._queues, self._put, self._quarantine = schedule, queues, put, quarantine
        self._gate = gate
        self._range, self._closed = range(start, stop), threading.Event()
        self.waits_for: str | None = None
        self._ready: queue.Queue = queue.Queue(maxsize=_DEPTH)
        self._thread = threading.Thread(target=self._work, name="feed", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        for step in self._range:
            try:
                # An adaptive sampler decides a step once it has seen losses enough.
                while not self._schedule.wait(step, timeout_s=0.2):
                    if self._closed.is_set():
                        return
                item = self._batch(step)
                self._gate.ready(step)
            except BaseException as e:
                self._gate.failed(step, e)
                self._offer(e)
                return
            if not self._offer(item):
                return

    def _offer(self, item) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def _batch(self, step: int) -> Batch:
        what = self._schedule[step]
        self.waits_for = what.task
        row = self._queues[what.task].next()
        self.waits_for = None
        if (row.task, row.batch, row.variant) != (what.task, what.batch, what.variant.name):
            raise DataError(
                f"step {step}: expected batch {what.batch} of {what.task} as {what.variant.name}, "
                f"found batch {row.batch} of {row.task} as {row.variant}"
            )
        # Order contract: rejects are on disk before their substitutes are used.
        self._quarantine.record(row, step=step, data_set=self._schedule.tasks[what.task].data_set)
        chance = chance_of(what.structure, row.arrays.get("positive_ids"))
        return Batch(step, what, self._put(group_arrays(row.arrays)), row.ids, chance)

    def next(self, *, wait: bool = True) -> Batch | None:
        """The next batch. wait False: None where it is not there yet. Raises what its making raised."""
        try:
            item = self._ready.get(block=wait)
        except queue.Empty:
            return None
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Ends the thread, and those that fill the queues: one that still puts arrays on a device, or asks Ray for a
        block, when its library has gone would abort the process, or start Ray anew."""
        self._closed.set()
        close_queues(self._queues)
        self._thread.join(timeout=_JOIN_S)


def close_queues(queues: Mapping[str, RowQueue]) -> None:
    """All are told before any is waited for."""
    for row_queue in queues.values():
        row_queue.close()
    deadline = time.monotonic() + _JOIN_S
    for row_queue in queues.values():
        row_queue.join(max(0.0, deadline - time.monotonic()))
