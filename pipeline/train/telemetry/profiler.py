"""A trace of a few steps with jax.profiler."""

from __future__ import annotations

import sys
from pathlib import Path

import jax


class ProfilerWindow:
    """Traces the steps first .. last (counted from 1) into RUN/profile.

    ``reached`` hears of every ``every``-th step, when it has ended and the next one is on its way: the trace starts
    early enough to have the whole of its first step, and holds some steps more.
    """

    def __init__(self, steps: tuple[int, int], *, folder: Path, start_step: int, every: int):
        (self._first, self._last), self._folder, self._every = steps, folder, every
        self._tracing = False
        self.reached(start_step)

    def reached(self, step: int) -> None:
        """step: updates done."""
        if self._tracing and step >= self._last:
            self.close()
        elif not self._tracing and self._first - 2 < step + self._every and step < self._last:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True

    def close(self) -> None:
        """Ends a trace that runs."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            print(f"profile of steps {self._first} to {self._last}: {self._folder}", file=sys.stderr, flush=True)
