"""Lines that say what a job is waiting for."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from pipeline.stopping import end_process

# Maximum number of seconds without such a line while one process waits; twice that when another process takes over.
EVERY_S = 5.0
# Seconds between two such lines on a wait that may last hours, once it has lasted that long.
RARELY_S = 60.0

_lock = threading.Lock()
_waits: list[Wait] = []
_last_line = time.monotonic()
_thread: threading.Thread | None = None


class Wait:
    """One thing that a job waits for. what: a text, or a function that returns the current text. long: maybe hours."""

    def __init__(self, what: str | Callable[[], str], *, long: bool = False):
        self.what, self._began, self._long = what, time.monotonic(), long

    def every_s(self) -> float:
        """Seconds between two lines about it, at the moment."""
        rare = self._long and time.monotonic() - self._began >= RARELY_S
        return RARELY_S if rare else EVERY_S

    def done(self) -> None:
        """Ends the lines about it."""
        with _lock:
            if self in _waits:
                _waits.remove(self)

    def line(self) -> str:
        """The line to print now."""
        what = self.what() if callable(self.what) else self.what
        return f"waiting for {what} ({time.monotonic() - self._began:.0f} s)"


@contextlib.contextmanager
def waiting_for(what: str | Callable[[], str], *, quiet: bool = False, long: bool = False) -> Iterator[Wait]:
    """Prints every ``EVERY_S`` seconds what the job waits for, until the block or ``Wait.done`` ends it.

    The innermost of nested waits is named. quiet: print nothing. long: a line a minute after the first minute.
    """
    global _thread
    wait = Wait(what, long=long)
    if not quiet:
        with _lock:
            _waits.append(wait)
            if _thread is None:
                _thread = threading.Thread(target=_watch, name="waiting", daemon=True)
                _thread.start()
    try:
        yield wait
    finally:
        wait.done()


def _watch() -> None:
    global _thread, _last_line
    while True:
        time.sleep(min(0.5, EVERY_S / 4))
        with _lock:
            if not _waits:
                _thread = None
                return
            wait = _waits[-1]
        if time.monotonic() - _last_line >= wait.every_s():
            _last_line = time.monotonic()
            say(wait.line())


def say(line: str) -> None:
    """Prints a line to stderr; does nothing if stderr is gone."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def at_most(seconds: float, line: str, *, code: int) -> Iterator[None]:
    """Ends the process with a line and an exit code if the block takes longer: for calls that nothing can stop."""

    def end() -> None:
        say(line)
        end_process(code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
