"""Before each step every rank asks its gate whether to go on: all ranks take the same steps and end after the same one.

What a rank has drawn for a step travels with the news that it has the step's batch, so the limit on rejects is judged
over all ranks, step by step: every number of ranks ends before the same step.

Knows nothing of Ray: ``StepCoordinator`` becomes an actor in ``pipeline/cluster/``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import time
from collections.abc import Callable

from pipeline.errors import DataError
from pipeline.train.reject_limit import Draws, RejectCounts

# Steps that the coordinator remembers after it has granted them: ranks are a step or two apart.
_KEPT_STEPS = 100


class NextAction(enum.Enum):
    """The step; the step after a save, because a machine is about to be taken away; the end of the run."""

    STEP = "step"
    SAVE = "save"
    STOP = "stop"


class StepGate:
    """The gate of a run of one process. should_stop: asked before each step.

    after_compile: whether a step is granted only once it is compiled. All processes run a step that was granted, so a
    stop would have to wait for its compile.
    """

    after_compile = False

    def __init__(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        self._should_stop = should_stop
        self._ended = False
        self.open(RejectCounts({}))

    def open(self, rejects: RejectCounts) -> None:
        """Takes the counts of the run's earlier part, before its first step."""
        self._found, self._before = rejects, RejectCounts({}, rejects.as_dict())
        # Step → the counts of its data set, it included; only of steps after those in ``_before``.
        self._totals: dict[int, tuple[str, int, int]] = {}

    def ready(self, step: int, draws: Draws) -> None:
        """This process has the batch of a step. Called by the feed's thread.

        Raises DataError if the step's draws show that a data set rejects more than its limit.
        """
        self._totals[step] = self._found.add([draws])
        if fault := self._found.fault([draws]):
            raise DataError(fault)

    def failed(self, step: int, error: BaseException) -> None:
        """This process cannot make the batch of a step. Called by the feed's thread."""

    def end(self, error: BaseException) -> None:
        """This process cannot go on: the run ends after the last step that was granted."""
        self._ended = True

    def next_action(self, step: int, *, wait: bool = True) -> NextAction | None:
        """Asked before each step by every process. wait False: None where the answer has not arrived yet."""
        self.rejects_before(step)
        return NextAction.STOP if self._ended or self._should_stop() else NextAction.STEP

    def leaves(self) -> bool:
        """Whether this process may end before a step that it was granted: with others in that step it may not."""
        return self._ended or self._should_stop()

    def lacks(self) -> str | None:
        """What the data of this run wait for outside of it, in words; None if nothing is known of such a thing."""
        return None

    def saved(self, step: int, *, compiles: bool) -> None:
        """The state after a step, the last of this process, is on disk. compiles: whether a compile holds its end."""

    def rejects_before(self, step: int) -> RejectCounts:
        """The draws and rejects of all processes for the steps before one. Called with steps in order."""
        # The feed is a few steps ahead: what it has drawn for them is drawn again after a kill.
        for done in sorted(done for done in list(self._totals) if done < step):
            self._before.set(*self._totals.pop(done))
        return self._before


@dataclasses.dataclass(frozen=True)
class News:
    """The state of the workers, for the driver.

    epoch: groups of workers that have started. running: whether one runs, or is being asked to. steps: whether a step
    of the present group was granted. saved: the step after which every rank has its state on disk and would end, but
    for a compile; None otherwise, and after a fault.
    lines: (whether it goes to stderr, text) of what they have printed since the last news.
    """

    epoch: int
    running: bool
    steps: bool
    saved: int | None
    lines: list[tuple[bool, str]]


class _Step:
    """A step that a rank has a batch for, or has asked for. missing: ranks that have no batch for it yet.

    decided: set once the step is granted or refused to all. total: as ``RejectCounts.add`` returns it. look: whether
    the ranks check for preemption before it.
    """

    def __init__(self, world_size: int) -> None:
        self.missing = set(range(world_size))
        self.draws: dict[int, Draws] = {}
        self.decided = asyncio.Event()
        self.total: tuple[str, int, int] | None = None
        self.look = False


# (whether to run the step, whether to check for preemption first, the counts of its data set): the same for every rank.
Grant = tuple[bool, bool, tuple[str, int, int] | None]
_REFUSED: Grant = (False, False, None)


class StepCoordinator:
    """Grants steps to all ranks of a run together.

    A step is granted once every rank has its batch and those before. So a rank that cannot make a batch stops all of
    them before that step, none of them inside it; and a stop that someone asks for comes after the last step that was
    granted. Each step wakes only those that wait for it, once.
    """

    # Seconds between preemption checks; each check is a barrier across all ranks.
    check_every_s = 2.0

    def __init__(self) -> None:
        self.epoch = 0
        self._running = False
        self._lines: list[tuple[bool, str]] = []
        self._steps: dict[int, _Step] = {}
        self._begin(1, 0, RejectCounts({}))

    def _begin(self, world_size: int, start_step: int, rejects: RejectCounts) -> None:
        self._world_size = world_size
        self._rejects = rejects
        # The last step that every rank has the batch of, as of all before it.
        self._complete = start_step - 1
        self._granted = -1
        # The last step of the run, once something has ended it.
        self._last: int | None = None
        # Rank → the step after which it has saved and ends, and whether a compile holds its end.
        self._saved: dict[int, tuple[int, bool]] = {}
        self._checked_at = 0.0
        self.reason: str | None = None
        for step in self._steps.values():
            step.decided.set()
        self._steps = {}

    async def begin(self, world_size: int, start_step: int = 0, rejects: RejectCounts | None = None) -> int:
        """Takes a new group of workers that starts at a step. Returns its epoch; calls of older ones end with a stop.

        A stop that was asked for holds for the new group too. rejects: the counts before the step.
        """
        stopped = self._last is not None and self.reason is None
        self.epoch, self._running = self.epoch + 1, True
        self._begin(world_size, start_step, rejects or RejectCounts({}))
        if stopped:
            self._last = self._granted
        return self.epoch

    async def ready(self, epoch: int, rank: int, step: int, draws: Draws | None = None) -> None:
        """A rank has the batch of a step. draws: what it has drawn for it."""
        if epoch != self.epoch or step <= self._complete:
            return
        # An actor's calls may run in another order than they were made in.
        entry = self._step(step)
        entry.missing.discard(rank)
        if draws is not None:
            entry.draws[rank] = draws
        while (entry := self._steps.get(self._complete + 1)) and not entry.missing:
            self._complete += 1
            self._judge(self._complete, entry)
            entry.decided.set()

    def _judge(self, step: int, entry: _Step) -> None:
        """Adds what was drawn for a step to the counts. The run ends before it if that is too much."""
        draws = [entry.draws[rank] for rank in sorted(entry.draws)]
        entry.draws = {}
        if draws:
            entry.total = self._rejects.add(draws)
            if fault := self._rejects.fault(draws):
                self._end_before(step, fault)

    async def failed(self, epoch: int, rank: int, step: int, reason: str) -> None:
        """A rank cannot make the batch of a step: the run ends before it."""
        if epoch == self.epoch:
            self._end_before(step, reason)

    async def end(self, epoch: int, reason: str) -> None:
        """A rank cannot go on: the run ends after the last step that was granted."""
        if epoch == self.epoch:
            self._end_after(self._granted)
            self.reason = self.reason or reason

    async def stop(self) -> None:
        """Asks for a stop after the last step that was granted."""
        if self._last is None:
            # Before the first step this refuses the first one that is asked for.
            self._end_after(self._granted)

    def _end_before(self, step: int, reason: str) -> None:
        if self._last is None or step <= self._last:
            self.reason = reason
            self._end_after(step - 1)

    def _end_after(self, step: int) -> None:
        self._last = step if self._last is None else min(self._last, step)
        for number, entry in self._steps.items():
            if number > self._last:
                entry.decided.set()

    async def saved(self, epoch: int, rank: int, step: int, compiles: bool) -> None:
        """A rank has its state after a step, its last, on disk. compiles: whether a compile holds its end."""
        if epoch == self.epoch:
            self._saved[rank] = step, compiles

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
        return News(self.epoch, self._running, self._granted >= 0, self._held_by_a_compile(), lines)

    def _held_by_a_compile(self) -> int | None:
        if len(self._saved) < self._world_size or self.reason:
            return None
        return max((step for step, compiles in self._saved.values() if compiles), default=None)

    async def why(self) -> str | None:
        """The reason that a rank gave for ending the run; None without one."""
        return self.reason

    async def last(self) -> int | None:
        """The number of updates after which the run stops; None while nothing has ended it."""
        return None if self._last is None else self._last + 1

    async def grant(self, epoch: int, step: int) -> Grant:
        """Waits until a step is granted or refused."""
        if epoch != self.epoch:
            return _REFUSED
        entry = self._step(step)
        if not self._ended(step):
            await entry.decided.wait()
        if epoch != self.epoch or self._ended(step):
            return _REFUSED
        if step > self._granted:
            self._granted = step
            self._decide_on_check(entry)
            self._steps.pop(step - _KEPT_STEPS, None)
        return True, entry.look, entry.total

    def _step(self, step: int) -> _Step:
        if step not in self._steps:
            self._steps[step] = _Step(self._world_size)
        return self._steps[step]

    def _decide_on_check(self, entry: _Step) -> None:
        if time.monotonic() - self._checked_at > self.check_every_s:
            entry.look, self._checked_at = True, time.monotonic()

    def _ended(self, step: int) -> bool:
        return self._last is not None and step > self._last
