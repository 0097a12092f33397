"""Pauses of Ray Data's scheduling loop, and its end."""

from __future__ import annotations

from typing import Any

from pipeline.cluster import ray_input

# Seconds for which the loop rests at most while nothing is decoded.
_IDLE_S = 0.2


class StreamEnded(Exception):
    """A stream ends because its rows are no longer wanted."""


class SchedulerPause:
    """Pauses between the steps of a stream's scheduling loop; one of Ray Data's execution callbacks.

    While nothing is decoded that loop spins (ray 2.60), and would take the GIL of the trainer beside it.
    """

    def before_execution_starts(self, executor: Any) -> None:
        self._source = ray_input.source_of(executor)

    def on_execution_step(self, executor: Any) -> None:
        if self._source.ended:
            # Ends the loop, and with it every wait for the stream's next block.
            raise StreamEnded
        if not ray_input.has_running_tasks(executor):
            self._source.rest(_IDLE_S)

    def after_execution_succeeds(self, executor: Any) -> None:
        """Nothing to do."""

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """Nothing to do."""
