"""Before each step every rank asks its gate whether to go on: all ranks take the same steps and end after the same one.

Knows nothing of Ray: ``StepCoordinator`` becomes an actor in ``pipeline/cluster/``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import time
from collections.abc import Callable


class NextAction(enum.Enum):
    """The step; the step after a save, because a machine is about to be taken away; the end of the run."""

    STEP = "step"
    SAVE = "save"
    STOP = "stop"


class StepGate:
    """The gate of a run of one process. should_stop: asked before each step."""

    def __init__(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        self._should_stop = should_stop
        self._ended = False

    def ready(self, step: int) -> None:
        """This process has the batch of a step. Called by the feed's thread."""

    def failed(self, step: int, error: BaseException) -> None:
        """This process cannot make the batch of a step. Called by the feed's thread."""

    def end(self, error: BaseException) -> None:
        """This process cannot go on: the run ends after the last step that was granted."""
        self._ended = True

    def next_action(self, step: int, *, wait: bool = True) -> NextAction | None:
        """Asked before each step by every process. wait False: None where the answer has not arrived yet."""
        return NextAction.STOP if self._ended or self._should_stop() else NextAction.STEP


@dataclasses.dataclass(frozen=True)
class News:
    """The state of the workers, for the driver.

    epoch: groups of workers that have started. running: whether one runs, or is being asked to. steps: whether a step
    of the present group was granted. silence_s: seconds since a rank of it was heard of. lines: (whether it goes to
    stderr, text) of what they have printed since the last news.
    """

    epoch: int
    running: bool
    steps: bool
    silence_s: float
    lines: list[tuple[bool, str]]


class StepCoordinator:
    """Grants steps to all ranks of a run together.

    A step is granted once every rank has its batch. So a rank that cannot make a batch stops all of them before that
    step, none of them inside it; and a stop that someone asks for comes after the last step that was granted.
    """

    # Seconds between preemption checks; each check is a barrier across all ranks.
    check_every_s = 2.0

    def __init__(self) -> None:
        self.epoch = 0
        self._changed = asyncio.Condition()
        self._heard_at = time.monotonic()
        self._running = False
        self._lines: list[tuple[bool, str]] = []
        self._begin(1)

    def _begin(self, world_size: int) -> None:
        # Rank → the last step whose batch it has; -1 before the first.
        self._ready = dict.fromkeys(range(world_size), -1)
        self._granted = -1
        # The last step of the run, once something has ended it.
        self._last: int | None = None
        self._check_steps: set[int] = set()
        self._checked_at = 0.0
        self.reason: str | None = None

    async def begin(self, world_size: int) -> int:
        """Takes a new group of workers. Returns its epoch; calls of older ones end with a stop.

        A stop that was asked for holds for the new group too.
        """
        async with self._changed:
            self._heard_at = time.monotonic()
            stopped = self._last is not None and self.reason is None
            self.epoch, self._running = self.epoch + 1, True
            self._begin(world_size)
            if stopped:
                self._last = self._granted
            self._changed.notify_all()
        return self.epoch

    async def ready(self, epoch: int, rank: int, step: int) -> None:
        """A rank has the batch of a step."""
        # An actor's calls may run in another order than they were made in.
        await self._change(epoch, lambda: self._ready.update({rank: max(self._ready[rank], step)}))

    async def failed(self, epoch: int, rank: int, step: int, reason: str) -> None:
        """A rank cannot make the batch of a step: the run ends before it."""

        def note() -> None:
            if self._last is None or step <= self._last:
                self._last, self.reason = step - 1, reason

        await self._change(epoch, note)

    async def end(self, epoch: int, reason: str) -> None:
        """A rank cannot go on: the run ends after the last step that was granted."""

        def note() -> None:
            self._last = self._granted if self._last is None else min(self._last, self._granted)
            self.reason = self.reason or reason

        await self._change(epoch, note)

    async def _change(self, epoch: int, change: Callable[[], None]) -> None:
        if epoch == self.epoch:
            self._heard_at = time.monotonic()
            async with self._changed:
                change()
                self._changed.notify_all()

    async def stop(self) -> None:
        """Asks for a stop after the last step that was granted."""
        async with self._changed:
            if self._last is None:
                # Before the first step this refuses the first one that is asked for.
                self._last = self._granted
            self._changed.notify_all()

    async def print(self, error: bool, text: str) -> None:
        """Takes what a rank prints, for the driver's terminal. error: to stderr."""
        self._lines.append((error, text))

    async def lost(self, text: str) -> None:
        """The present group has failed, and no other one has started yet."""
        self._running = False
        self._lines.append((False, text))

    async def news(self) -> News:
        """The state of the workers, and the lines since the last call."""
        lines, self._lines = self._lines, []
        return News(self.epoch, self._running, self._granted >= 0, time.monotonic() - self._heard_at, lines)

    async def why(self) -> str | None:
        """The reason that a rank gave for ending the run; None without one."""
        return self.reason

    async def grant(self, epoch: int, step: int) -> tuple[bool, bool]:
        """(whether to run the step, whether to check for preemption first: the same answer for every rank)."""
        if epoch != self.epoch:
            return False, False
        self._heard_at = time.monotonic()
        async with self._changed:
            await self._changed.wait_for(
                lambda: epoch != self.epoch or self._ended(step) or min(self._ready.values()) >= step
            )
            if epoch != self.epoch or self._ended(step):
                return False, False
            if step > self._granted:
                self._granted = step
                self._decide_on_check(step)
            return True, step in self._check_steps

    def _decide_on_check(self, step: int) -> None:
        if time.monotonic() - self._checked_at > self.check_every_s:
            # Ranks are a step or two apart: slower ones have yet to ask for the steps before.
            self._check_steps = {s for s in self._check_steps if s > step - 100} | {step}
            self._checked_at = time.monotonic()

    def _ended(self, step: int) -> bool:
        return self._last is not None and step > self._last
