"""Grants steps to all ranks of a run together.

Knows nothing of Ray: ``pipeline/cluster/step_actors.py`` makes an actor of it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
import time

from pipeline.train.reject_limit import Draws, RejectCounts

# Maximum number of callers of a step. A call costs the called process half a millisecond of CPU.
MAX_CALLERS = 8
# Maximum number of groups that call the coordinator: its machine has other work.
MAX_GROUPS = 4

# (whether to run the step, whether to check for preemption first, the counts of its data set): the same for every rank.
Grant = tuple[bool, bool, tuple[str, int, int] | None]
REFUSED: Grant = (False, False, None)


def callers_of(ranks: range, *, most: int = MAX_CALLERS) -> list[range]:
    """The callers of one who grants steps to some ranks: single ranks, or groups of about the same size.

    most: maximum number of groups.
    """
    if len(ranks) <= MAX_CALLERS:
        return [range(rank, rank + 1) for rank in ranks]
    number = min(most, math.ceil(len(ranks) / MAX_CALLERS))
    bounds = [ranks.start + len(ranks) * part // number for part in range(number + 1)]
    return [range(*pair) for pair in itertools.pairwise(bounds)]


def callers_of_coordinator(world_size: int) -> list[range]:
    """The ranks of each caller of the coordinator."""
    return callers_of(range(world_size), most=MAX_GROUPS)


def groups_of(rank: int, world_size: int) -> list[range]:
    """The groups that a rank's requests pass through, from the coordinator on; none where the rank calls it."""
    groups, callers = [], callers_of_coordinator(world_size)
    while len(ranks := next(caller for caller in callers if rank in caller)) > 1:
        groups.append(ranks)
        callers = callers_of(ranks)
    return groups


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
    """A step that was asked for. draws: first rank of a caller → what its ranks have drawn. grant: once decided."""

    def __init__(self) -> None:
        self.draws: dict[int, Draws] = {}
        self.decided = asyncio.Event()
        self.grant = REFUSED

    def decide(self, grant: Grant) -> None:
        if not self.decided.is_set():
            self.grant = grant
            self.decided.set()


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
        self._over, self._group_came = asyncio.Event(), asyncio.Event()
        self._begin(1, 0, RejectCounts({}))

    def _begin(self, world_size: int, start_step: int, rejects: RejectCounts) -> None:
        self._world_size = world_size
        self._num_callers = len(callers_of_coordinator(world_size))
        self._rejects = rejects
        self._next = start_step
        self._any_granted = False
        # The last step of the run, once something has ended it.
        self._last: int | None = None
        # Rank → the step after which it has saved and ends, and whether a compile holds its end.
        self._saved: dict[int, tuple[int, bool]] = {}
        # A group's ranks → its actor. Without a handle an actor ends.
        self._groups: dict[range, object] = {}
        self._group_came.set()
        self._group_came = asyncio.Event()
        self._checked_at = 0.0
        self.reason: str | None = None
        for step in self._steps.values():
            step.decide(REFUSED)
        self._steps = {}
        self._over.set()
        self._over = asyncio.Event()

    async def begin(self, world_size: int, start_step: int = 0, rejects: RejectCounts | None = None) -> int:
        """Takes a new group of workers that starts at a step. Returns its epoch; calls of older ones end with a stop.

        A stop that was asked for holds for the new group too. rejects: the counts before the step.
        """
        stopped = self._last is not None and self.reason is None
        self.epoch, self._running = self.epoch + 1, True
        self._begin(world_size, start_step, rejects or RejectCounts({}))
        if stopped:
            self._end_after(start_step - 1)
        return self.epoch

    async def lead(self, epoch: int, ranks: range, group: object) -> None:
        """Takes the actor of a group of ranks."""
        if epoch == self.epoch:
            self._groups[ranks] = group
            came, self._group_came = self._group_came, asyncio.Event()
            came.set()

    async def group(self, epoch: int, ranks: range) -> object:
        """Waits for the actor of a group of ranks. Returns None to ranks of an older epoch."""
        while epoch == self.epoch:
            if ranks in self._groups:
                return self._groups[ranks]
            await self._group_came.wait()
        return None

    async def step(self, epoch: int, caller: int, step: int, draws: Draws) -> Grant:
        """A caller asks for a step: all its ranks have the batch.

        caller: its first rank. draws: what its ranks have drawn for the step, together. Waits until the step is
        granted or refused.
        """
        if epoch != self.epoch or self._ended(step):
            return REFUSED
        entry = self._steps.setdefault(step, _Step())
        entry.draws[caller] = draws
        # An actor's calls may run in another order than they were made in.
        while (ready := self._steps.get(self._next)) and len(ready.draws) == self._num_callers:
            self._decide(self._next, self._steps.pop(self._next))
        await entry.decided.wait()
        return entry.grant

    def _decide(self, step: int, entry: _Step) -> None:
        """Grants a step that every rank has the batch of, unless too much of what was drawn for it is bad."""
        draws = [entry.draws[caller] for caller in sorted(entry.draws)]
        total = self._rejects.add(draws)
        if fault := self._rejects.fault(draws):
            self._end_before(step, fault)
        if self._ended(step):
            entry.decide(REFUSED)
            return
        self._next, self._any_granted = step + 1, True
        look = time.monotonic() - self._checked_at > self.check_every_s
        if look:
            self._checked_at = time.monotonic()
        entry.decide((True, look, total))
        self._note_end()

    async def over(self, epoch: int) -> int:
        """Waits until the run's last step is granted or, without one, refused. Returns it: no later one is granted."""
        if epoch == self.epoch:
            over = self._over
            await over.wait()
        return -1 if epoch != self.epoch or self._last is None else self._last

    async def failed(self, epoch: int, rank: int, step: int, reason: str) -> None:
        """A rank cannot make the batch of a step: the run ends before it."""
        if epoch == self.epoch:
            self._end_before(step, reason)

    async def end(self, epoch: int, reason: str) -> None:
        """A rank cannot go on: the run ends after the last step that was granted."""
        if epoch == self.epoch:
            self._end_after(self._next - 1)
            self.reason = self.reason or reason

    async def stop(self) -> None:
        """Asks for a stop after the last step that was granted."""
        if self._last is None:
            # Before the first step this refuses the first one that is asked for.
            self._end_after(self._next - 1)

    def _end_before(self, step: int, reason: str) -> None:
        if self._last is None or step <= self._last:
            self.reason = reason
            self._end_after(step - 1)

    def _end_after(self, step: int) -> None:
        self._last = step if self._last is None else min(self._last, step)
        for number in [number for number in self._steps if self._ended(number)]:
            self._steps.pop(number).decide(REFUSED)
        self._note_end()

    def _note_end(self) -> None:
        # Until then a rank that fails may still bring the end forward.
        if self._ended(self._next):
            self._over.set()

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
        return News(self.epoch, self._running, self._any_granted, self._held_by_a_compile(), lines)

    def _held_by_a_compile(self) -> int | None:
        if len(self._saved) < self._world_size or self.reason:
            return None
        return max((step for step, compiles in self._saved.values() if compiles), default=None)

    async def now(self) -> float:
        """Seconds since the epoch by the clock of this machine, the command's."""
        return time.time()

    async def trains(self) -> bool:
        """Whether a step of the present group was granted."""
        return self._any_granted

    async def why(self) -> str | None:
        """The reason that a rank gave for ending the run; None without one."""
        return self.reason

    async def last(self) -> int | None:
        """The number of updates after which the run stops; None while nothing has ended it."""
        return None if self._last is None else self._last + 1

    def _ended(self, step: int) -> bool:
        return self._last is not None and step > self._last
