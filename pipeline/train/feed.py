"""The batches of the next steps, put on the devices while the current step runs; rejects are journalled on the way."""

from __future__ import annotations

import dataclasses
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from model.structure import Structure
from pipeline.data.plan import Arrival, Row, group_arrays
from pipeline.errors import DataError
from pipeline.train.chance import chance_of
from pipeline.train.mixture.schedule import Schedule, Step
from pipeline.train.quarantine import Quarantine
from pipeline.train.reject_limit import Draws
from pipeline.train.step_gate import StepGate

# Stages of making a batch, in this order: the sampler's choice of a task; the batch decoded, its block brought here
# from the machine that decoded it, and taken apart; its rejects journalled; its arrays put on the devices.
STAGES = ("sampler", "decode", "transfer", "batch", "journal", "devices")
# Batches on the devices ahead of the step that runs.
_DEPTH = 2
# Seconds between two looks for a stop while a batch is waited for.
_LOOK_S = 0.2
# Seconds for the thread, which may be putting a batch on a device, and for all queues' threads to end.
_JOIN_S = 5.0


class RowQueue(Protocol):
    """The rows of one task in order."""

    def next(self) -> Row:
        """Waits for the next row."""

    def arrival(self) -> Arrival:
        """When the row that ``next`` gave last was decoded, and was here."""

    def awaits(self) -> str:
        """What the next row is waiting for, in words."""

    def close(self) -> None:
        """Ends the queue and wakes whoever waits in ``next``."""

    def join(self, timeout_s: float) -> bool:
        """Waits for what fills the queue, at most ``timeout_s``. Returns whether it has ended."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """One step's batch on the devices.

    ids: this process's samples. chance: the loss of guessing (``chance_of``). made_s: seconds of each of ``STAGES``.
    graph_s: seconds for which the batch was made and its step not compiled.
    """

    step: int
    plan: Step
    arrays: dict
    ids: list[str]
    chance: float
    made_s: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    graph_s: float = 0.0

    def waits(self, wait_s: float) -> dict[str, float]:
        """The seconds waited for this batch by stage: what was waited for is the end of making it."""
        waits, left = {}, wait_s
        for stage in reversed(STAGES):
            waits[stage] = min(left, self.made_s[stage])
            left -= waits[stage]
        # Threads that waited for the processor, which decoders take.
        waits["decode"] += left
        return waits


class _Laps:
    """Seconds of the stages of one batch, each from the end of the one before."""

    def __init__(self) -> None:
        self.seconds, self._ended = dict.fromkeys(STAGES, 0.0), time.perf_counter()

    def end(self, stage: str, *, at: float = math.inf) -> None:
        """at: the moment at which it ended: now, or one before, as of a batch that was ready when it was wanted."""
        at = max(self._ended, min(at, time.perf_counter()))
        self.seconds[stage], self._ended = at - self._ended, at


class Feed:
    """Iterates over the batches of the steps of a schedule, in order.

    to_devices: local arrays → global arrays on the devices. gate: is told of every batch that is made, with its draws,
    and of the one that cannot be. await_graph: waits for the compiled step of a structure, or until its second argument
    returns True, before the gate is told; None: the gate does not care.
    """

    def __init__(
        self,
        schedule: Schedule,
        queues: Mapping[str, RowQueue],
        *,
        to_devices: Callable[[dict], dict],
        quarantine: Quarantine,
        gate: StepGate,
        await_graph: Callable[[Structure, Callable[[], bool]], object] | None = None,
    ) -> None:
        self._await_graph = await_graph
        self._schedule = schedule
        self._queues = queues
        self._to_devices = to_devices
        self._quarantine = quarantine
        self._gate = gate
        self._closed = threading.Event()
        self._wanted: str | None = None
        self._ready: queue.Queue = queue.Queue(maxsize=_DEPTH)
        self._thread = threading.Thread(target=self._work, name="feed", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        for step in self._schedule.steps:
            laps = _Laps()
            try:
                # An adaptive sampler may need more losses before it can choose this step's task.
                while not self._schedule.wait(step, timeout_s=0.2):
                    if self._closed.is_set():
                        return
                laps.end("sampler")
                item, draws = self._batch(step, laps)
                if self._await_graph:
                    began = time.perf_counter()
                    self._await_graph(item.plan.structure, self._closed.is_set)
                    item = dataclasses.replace(item, graph_s=time.perf_counter() - began)
                self._gate.ready(step, draws)
            except BaseException as e:
                self._gate.failed(step, e)
                self._offer(e)
                return
            if not self._offer(item):
                return

    def _offer(self, item: Batch | BaseException) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def _batch(self, step: int, laps: _Laps) -> tuple[Batch, Draws]:
        plan = self._schedule[step]
        self._wanted = plan.task
        row = self._queues[plan.task].next()
        self._wanted = None
        decoded_at, here_at = self._queues[plan.task].arrival()
        laps.end("decode", at=decoded_at)
        laps.end("transfer", at=here_at)
        if (row.task, row.batch, row.variant) != (plan.task, plan.batch, plan.variant.name):
            raise DataError(
                f"step {step}: expected batch {plan.batch} of {plan.task} as {plan.variant.name}, "
                f"found batch {row.batch} of {row.task} as {row.variant}"
            )
        groups, chance = group_arrays(row.arrays), chance_of(plan.structure, row.arrays.get("positive_ids"))
        laps.end("batch")
        # Order contract: rejects are on disk before their substitutes are used.
        draws = self._quarantine.record(row, step=step, data_set=self._schedule.tasks[plan.task].data_set)
        laps.end("journal")
        arrays = self._to_devices(groups)
        laps.end("devices")
        return Batch(step, plan, arrays, row.ids, chance, laps.seconds), draws

    @property
    def waits_for(self) -> str | None:
        """The batch that the feed waits for at the moment, and what holds it up; None if it waits for none."""
        task = self._wanted
        return None if task is None else f"a batch of {task} ({self._queues[task].awaits()})"

    def next(self, *, wait: bool = True, leave: Callable[[], bool] = lambda: False) -> Batch | None:
        """The next batch. Raises the error of making it.

        wait False: None if it is not ready yet. leave: asked again and again while waiting; None once it is true.
        """
        while True:
            try:
                item = self._ready.get(block=wait, timeout=_LOOK_S)
                break
            except queue.Empty:
                if not wait or leave():
                    return None
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Ends this thread and those that fill the queues.

        A thread that puts arrays on a device after JAX has shut down would abort the process; one that asks Ray for a
        block would start Ray again.
        """
        self._closed.set()
        close_queues(self._queues)
        self._thread.join(timeout=_JOIN_S)


def close_queues(queues: Mapping[str, RowQueue]) -> None:
    """Closes all queues, and only then waits for their threads."""
    for row_queue in queues.values():
        row_queue.close()
    deadline = time.monotonic() + _JOIN_S
    for row_queue in queues.values():
        row_queue.join(max(0.0, deadline - time.monotonic()))
