"""A trace of a few steps with jax.profiler."""

from __future__ import annotations

import sys
from pathlib import Path

import jax

from pipeline.files import cache_dir
from pipeline.store.path import local_folder, publish


class ProfilerWindow:
    """Traces the steps first .. last (counted from 1) into ``profile/``.

    ``reached`` is called after each step, while the next one is already running: the trace starts early enough to
    hold the whole first step, and so also holds a few steps before it.
    """

    def __init__(self, steps: tuple[int, int], *, run_dir: Path, start_step: int):
        self._first, self._last = steps
        self._folder = local_folder(run_dir, cache_dir()) / "profile"
        self._target = run_dir / "profile"
        self._tracing = False
        self.reached(start_step)

    def reached(self, step: int) -> None:
        """step: updates completed."""
        if self._tracing and step >= self._last:
            self.close()
        elif not self._tracing and self._first - 2 <= step < self._last:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True

    def close(self) -> None:
        """Stops a running trace."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            publish(self._folder, self._target)
            print(f"profile of steps {self._first} to {self._last}: {self._target}", file=sys.stderr, flush=True)
