"""Ctrl-C, SIGTERM and a closed terminal: obeyed at any moment of a job, with one line that says what happens."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from pipeline.errors import EXIT_RUN_AGAIN

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Seconds from a stop to the end of a job that has something to save.
LIMIT_S = 55.0
# Exit code of the last job of this process.
_code: int | None = None
_SHOW_CURSOR = "\x1b[?25h"
# Linux's option that makes a process the parent of its orphaned descendants.
_PR_SET_CHILD_SUBREAPER = 36
# Maximum number of looks for descendants that were started while others were killed.
_LOOKS = 100
# File descriptors to which signals are written.
_OPEN: set[int] = set()


class Stop:
    """A request to stop, made by signals.

    While nothing would be lost, a signal ends the process immediately. After ``defer`` the first one only sets the
    request, so that the job can save its state; the second one ends the process, and so does the end of ``limit_s``
    seconds: a compile or a device that hangs holds a step for longer than anyone waits.

    has_state: asked at a signal before ``defer``: whether there is something to save by now, which other processes may
    know first. It answers within seconds, and raises nothing.
    """

    def __init__(self, message: str):
        """message: printed when a signal ends the process now."""
        self.limit_s = LIMIT_S
        self.has_state: Callable[[], bool] = lambda: False
        self._timer: threading.Timer | None = None
        self._asked = threading.Event()
        self._deferred = False
        self._message = message
        self._reader: int | None = None
        self._lock, self._ending = threading.Lock(), threading.Lock()

    def is_set(self) -> bool:
        """Whether a stop has been requested."""
        return self._asked.is_set()

    def defer(self, message: str = "stopped at once, without saving; run the same command again") -> None:
        """From now on the job has something to save. message: printed at a second signal."""
        with self._lock:
            self._deferred, self._message = True, message

    def at_once(self, message: str) -> None:
        """From now on nothing is lost when the process ends. Ends it if a stop has been requested."""
        with self._lock:
            self._deferred, self._message, self.has_state = False, message, lambda: False
        if self.is_set():
            self.end()

    def end(self, code: int = EXIT_RUN_AGAIN) -> None:
        """Ends the process with one line.

        No clean-up runs: nothing that the process is doing, be it the import of a library, may delay the end or add a
        traceback. Files are whole or absent; child processes end too.
        """
        # A signal may come while the job ends itself: one line.
        with self._ending:
            _print(self._message)
            end_process(code)

    def _end_late(self) -> None:
        _print(f"stopped {self.limit_s:g} s after it was asked for, without saving; run the same command again")
        end_process(EXIT_RUN_AGAIN)

    def close(self) -> None:
        """The job has ended: its limit no longer holds."""
        if self._timer is not None:
            self._timer.cancel()

    def install(self) -> None:
        """Installs the handlers; called again after a library may have replaced them."""
        for number in SIGNALS:
            # Signals that the process was started to ignore (nohup) stay ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _noted)

    def watch(self) -> int:
        """Starts the thread that obeys. Returns the file descriptor to which signals are to be written.

        A Python handler would have to wait for the main thread, which may be in a C++ call of minutes.
        """
        self._reader, write = os.pipe()
        os.set_blocking(write, False)
        threading.Thread(target=self._obey, name="stop", daemon=True).start()
        return write

    def _obey(self) -> None:
        while data := os.read(self._reader, 1):
            if data[0] in SIGNALS:
                self._take(data[0])
        os.close(self._reader)

    def ask(self) -> None:
        """Requests a stop as the first signal does, unless one has been requested."""
        if not self.is_set():
            self._take(signal.SIGTERM)

    def _take(self, number: int) -> None:
        if not self._deferred and self.has_state():
            self.defer()
        with self._lock:
            deferred, again = self._deferred, self._asked.is_set()
            if deferred and not again:
                self._timer = threading.Timer(self.limit_s, self._end_late)
                self._timer.daemon = True
                self._timer.start()
                # Before the request can be seen: the job's own line comes after it.
                _print("stopping after this step, saving the state ... (once more: at once, without saving)")
            self._asked.set()
        if not deferred:
            self.end()
        elif again:
            self.end(128 + number)


@contextlib.contextmanager
def obeyed(message: str) -> Iterator[Stop]:
    """Obeys signals inside the block. message: printed when one ends the process before ``Stop.defer``."""
    stop = Stop(message)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    write = stop.watch()
    old = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    _OPEN.add(write)
    stop.install()
    try:
        yield stop
    finally:
        stop.close()
        signal.set_wakeup_fd(old)
        for number, handler in before.items():
            signal.signal(number, handler)
        _OPEN.discard(write)
        os.close(write)


def _noted(number: int, frame: FrameType | None) -> None:
    """Does nothing: the thread of ``Stop.watch`` acts."""


def _leave_to_the_parent() -> None:
    """Resets the signals of a forked child: they must not look like its parent's."""
    if _OPEN:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            if signal.getsignal(number) is _noted:
                signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_leave_to_the_parent)


def bound_end(code: int) -> None:
    """Ends the process with a code ``LIMIT_S`` after its work has ended, if another thread holds it until then.

    A library's thread that waits for ever would; the last code that was given counts.
    """
    global _code
    first, _code = _code is None, code
    if first:
        ending = threading.Event()
        # Called before Python waits for threads, those of executors too, for which it waits first.
        threading._register_atexit(ending.set)
        threading.Thread(target=_end_when_held, args=(ending,), name="end", daemon=True).start()


def _end_when_held(ending: threading.Event) -> None:
    ending.wait()
    time.sleep(LIMIT_S)
    _print(f"a thread of this process has not ended within {LIMIT_S:g} s of all its work: ended")
    end_process(_code or 0)


def end_process(code: int) -> NoReturn:
    """Ends this process and all its descendants now: Ray's processes would outlive their driver by minutes."""
    if sys.platform == "linux":
        # A child of one that is killed stays within reach.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    killed: set[int] = set()
    for _ in range(_LOOKS):
        # Parents first, in the order in which they are found: a shell would say that its child was killed.
        found = [pid for pid in _descendants(os.getpid()) if pid not in killed]
        if not found:
            break
        for pid in found:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        killed.update(found)
    os._exit(code)


def _descendants(root: int) -> list[int]:
    """The descendants of a process, parents first; none without /proc."""
    children: dict[int, list[int]] = {}
    with contextlib.suppress(OSError):
        for name in filter(str.isdigit, os.listdir("/proc")):
            # The process may have ended by now.
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                # The name before it, in brackets, may contain any character.
                parent = int(file.read().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    found = children.get(root, [])
    for pid in found:
        found += children.get(pid, [])
    return found


def _print(line: str) -> None:
    # The terminal may be gone, or stderr busy with another line.
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        # A live panel hides the cursor.
        print((_SHOW_CURSOR if sys.stderr.isatty() else "") + line, file=sys.stderr, flush=True)
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        sys.stdout.flush()
