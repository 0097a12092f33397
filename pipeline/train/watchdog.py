"""Ends a run that makes no progress, with the stacks of all threads of the process."""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import EXIT_FAILED
from pipeline.stopping import end_process
from pipeline.waiting import say

# Seconds after which ``faulthandler``, which needs no GIL, takes over from a watchdog that a thread blocks by never
# releasing it.
_BACKSTOP_S = 30.0
# Seconds without a heartbeat after which the process is asked what it waits for, again and again.
_ASK_EVERY_S = 60.0
# Factor on the usual limit during a compile or a save, or while the process computes.
_PATIENCE = 4
# Minimum share of one CPU's time of a process that computes; one that hangs waits.
_COMPUTES = 0.5


def computes(silent_s: float, cpu_s: float) -> bool:
    """Whether a process without a heartbeat for ``silent_s`` used CPU time like one that works."""
    return cpu_s > _COMPUTES * silent_s


def _answer(question: Callable[[], str | None]) -> str | None:
    """The answer, None where there is none: a cluster that does not answer is no excuse."""
    with contextlib.suppress(Exception):
        return question()
    return None


class Watchdog:
    """Ends the process when ``heartbeat`` was not called for ``timeout_s``; the stacks go to ``path`` and to stderr.

    A process that computes all the time is slow, not hung: it gets _PATIENCE times as long, and a line says so. One
    that was frozen has not hung.
    is_patient: whether something else may take that long now. waits_for: what the process waits for, in words, for a
    line a minute; of ranks other than 0 once, since hundreds of them may wait for the same. excuse: such a thing that
    is not up to this run; waiting for it has no limit. A file that another process left at ``path`` is kept, and a
    number added to the name.
    """

    def __init__(self, path: Path, *, timeout_s: float, rank: int = 0) -> None:
        self._timeout_s = timeout_s
        self._rank = rank
        self._path = path
        number = 2
        self.is_patient: Callable[[], bool] = lambda: False
        self.excuse: Callable[[], str | None] = lambda: None
        self.waits_for: Callable[[], str | None] = lambda: None
        self._waited_for: str | None = None
        while self._path.exists() and self._path.stat().st_size:
            self._path, number = path.with_stem(f"{path.stem}-{number}"), number + 1
        self._file = None
        self._closed, self._warned = threading.Event(), False
        self.heartbeat("the start")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def heartbeat(self, finished: str) -> None:
        """Notes progress. finished: in a few words."""
        self._finished, self._waited_for = finished, None
        self._last = self._began = self._asked_at = time.monotonic()
        self._cpu_s = time.process_time()

    def _watch(self) -> None:
        interval, looked_at = min(1.0, self._timeout_s / 4), time.monotonic()
        # Also for a hang before the first look, which holds the GIL or is seen late.
        self._arm()
        while not self._closed.wait(interval):
            now = time.monotonic()
            self._forgive(now - looked_at - interval, now)
            self._look()
            # A look that itself takes long, since the cluster does not answer, is no frozen process.
            looked_at = time.monotonic()

    def _forgive(self, late_s: float, now: float) -> None:
        """Leaves out a time in which this thread did not run: the whole process was frozen, as by Ctrl-Z."""
        if late_s > self._timeout_s / 4:
            self._last = min(now, self._last + late_s)

    def _look(self) -> None:
        self._ask()
        silent_s, limit_s = time.monotonic() - self._last, self._timeout_s
        if silent_s > limit_s:
            slow = computes(silent_s, time.process_time() - self._cpu_s)
            if slow:
                self._say_slow()
            limit_s *= _PATIENCE if slow or self.is_patient() else 1
        if silent_s > limit_s:
            self._end(limit_s)
        self._arm()

    def _ask(self) -> None:
        """Says what the process waits for. Begins to count anew if that is an excuse."""
        now = time.monotonic()
        if now - self._asked_at < min(_ASK_EVERY_S, self._timeout_s / 4):
            return
        first, self._asked_at = self._asked_at == self._began, now
        if excuse := _answer(self.excuse):
            self._last = now
        self._waited_for = excuse or _answer(self.waits_for)
        if self._waited_for and (self._rank == 0 or (first and not excuse)):
            who = f"rank {self._rank}: " if self._rank else ""
            say(f"{who}waiting for {self._waited_for} ({now - self._began:.0f} s since {self._finished})")

    def _say_slow(self) -> None:
        if self._warned:
            return
        self._warned = True
        say(
            f"rank {self._rank}: nothing was finished for {self._timeout_s:g} s since {self._finished}, but the "
            f"process computes: slow, not hung; it has {_PATIENCE * self._timeout_s:g} s in all "
            "(cluster.stall_timeout_s)"
        )

    def _arm(self) -> None:
        if self._file is None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self._path, "w", encoding="utf-8")
            except OSError:
                # A full disk ends the run elsewhere; a hang must end even then.
                self._file = sys.__stderr__
        faulthandler.dump_traceback_later(_PATIENCE * self._timeout_s + _BACKSTOP_S, exit=True, file=self._file)

    def _end(self, limit_s: float) -> None:
        waited_for = f"; it waits for {self._waited_for}" if self._waited_for else ""
        line = (
            f"rank {self._rank}: nothing was finished for {limit_s:g} s, the last was {self._finished}{waited_for}. "
            f"The stacks of all threads: {self._path}. The newest checkpoint is safe; cluster.stall_timeout_s is the "
            "limit"
        )
        say(f"failed: {line}")
        with contextlib.suppress(OSError), open(self._path, "w", encoding="utf-8") as file:
            file.write(line + "\n\n")
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)
        # The terminal may be gone, or never have been there.
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        # Nothing else ends threads that hang.
        end_process(EXIT_FAILED)

    def close(self) -> None:
        """Ends the watch, and removes its file if it is empty."""
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if self._file not in (None, sys.__stderr__):
            self._file.close()
        if self._path.exists() and not self._path.stat().st_size:
            self._path.unlink()
            # The folder may hold the file of another rank.
            with contextlib.suppress(OSError):
                self._path.parent.rmdir()
