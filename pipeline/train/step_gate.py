"""Before each step every rank asks its gate whether to go on: all ranks take the same steps and end after the same one.

What a rank has drawn for a step travels with the news that it has the step's batch, so the limit on rejects is judged
over all ranks, step by step: every number of ranks ends before the same step.

The other side of the gate, for runs of several ranks, is ``step_coordinator.py``.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

from pipeline.errors import DataError
from pipeline.train.reject_limit import Draws, RejectCounts


class NextAction(enum.Enum):
    """The step; the step after a save, because a machine is about to be taken away; the end of the run."""

    STEP = "step"
    SAVE = "save"
    STOP = "stop"


class StepGate:
    """The gate of a run of one process. should_stop: asked before each step.

    after_compile: whether a step is granted only once it is compiled. All processes run a step that was granted, so a
    stop would have to wait for its compile. clock_off_s: seconds by which this machine's clock is ahead of that of the
    command's machine.
    """

    after_compile = False
    clock_off_s = 0.0

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
