"""Pauses of Ray Data's scheduling loops, and their end."""

from __future__ import annotations

import time
import weakref
from typing import Any

from pipeline.cluster import ray_private


class StreamEnded(Exception):
    """A stream ends because its rows are no longer wanted."""


# Those of the loops that run in this process.
_PAUSES: weakref.WeakSet[SchedulerPause] = weakref.WeakSet()


def end_streams() -> None:
    """Ends the loops of all streams that run in this process."""
    for pause in list(_PAUSES):
        pause.ended = True


class SchedulerPause:
    """Pauses between the steps of a stream's scheduling loop; one of Ray Data's execution callbacks.

    That loop spins while the stream is as far ahead as it may be: nine idle streams took a whole core and the GIL of
    the trainer beside them (ray 2.60). While a task runs the loop waits for it, and spins only if its output may not be
    read yet.
    """

    idle_s = 0.2
    busy_s = 0.02
    ended = False

    def before_execution_starts(self, executor: Any) -> None:
        _PAUSES.add(self)

    def on_execution_step(self, executor: Any) -> None:
        if self.ended:
            # Ends the loop, and with it every wait for the stream's next block.
            raise StreamEnded
        time.sleep(self.busy_s if ray_private.has_running_tasks(executor) else self.idle_s)

    def after_execution_succeeds(self, executor: Any) -> None:
        """Nothing to do."""

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """Nothing to do."""


class ClusterSchedulerPause(SchedulerPause):
    """Shorter pauses: on a cluster each stream's loop has a process of its own, and blocks come faster."""

    idle_s = 0.01
    busy_s = 0.0
