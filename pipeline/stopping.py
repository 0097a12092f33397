"""Ctrl-C, SIGTERM and a terminal that closes: obeyed at any moment of a job, and told truthfully."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

from pipeline.errors import EXIT_RUN_AGAIN

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SHOW_CURSOR = "\x1b[?25h"


class Stop:
    """What signals have asked this process for.

    As long as nothing would be lost, a signal ends the process at once. After ``defer`` the first one is only noted,
    for the job to save its state, and the second one ends the process.
    """

    def __init__(self, told: str):
        """told: what is said when a signal ends the process now."""
        self._asked, self._deferred, self._told, self._reader = threading.Event(), False, told, None
        self._lock = threading.Lock()

    def is_set(self) -> bool:
        return self._asked.is_set()

    def defer(self, told: str = "stopped at once, without saving; run the same command again") -> None:
        """From here on there is something to save. told: what is said at a second signal."""
        with self._lock:
            self._deferred, self._told = True, told

    def at_once(self, told: str) -> None:
        """From here on nothing is lost when the process ends. Ends it where a stop has been asked for."""
        with self._lock:
            self._deferred, self._told = False, told
        if self.is_set():
            self.end()

    def end(self, code: int = EXIT_RUN_AGAIN) -> None:
        """Ends the process with one line.

        No clean-up runs: whatever the process is in the middle of, a library half imported too, may neither delay the
        end nor add a traceback. Files are whole or absent; processes below this one are ended with it.
        """
        _say(self._told)
        end_process(code)

    def install(self) -> None:
        """Takes the signals; again where a library may have taken them since."""
        for number in SIGNALS:
            # What a process was started to ignore (nohup) stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _noted)

    def watch(self) -> int:
        """Starts the thread that obeys. Returns the file descriptor that signals are to be written to.

        A handler of Python's would have to wait for the main thread, which may be in a call of minutes into C++.
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

    def _take(self, number: int) -> None:
        with self._lock:
            deferred, again = self._deferred, self._asked.is_set()
            self._asked.set()
        if not deferred:
            self.end()
        elif again:
            self.end(128 + number)
        else:
            _say("stopping after this step, saving the state ... (once more: at once, without saving)")


@contextlib.contextmanager
def obeyed(told: str) -> Iterator[Stop]:
    """Obeys signals inside the block. told: what is said when one ends the process before ``Stop.defer``."""
    stop = Stop(told)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before, write = {number: signal.getsignal(number) for number in SIGNALS}, stop.watch()
    old = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    _OPEN.add(write)
    stop.install()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(old)
        for number, handler in before.items():
            signal.signal(number, handler)
        _OPEN.discard(write)
        os.close(write)


def _noted(number, frame) -> None:
    """Nothing: the thread of ``Stop.watch`` acts."""


_OPEN: set[int] = set()


def _leave_to_the_parent() -> None:
    """A forked child's signals are its own: they must not look like its parent's."""
    if _OPEN:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            if signal.getsignal(number) is _noted:
                signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_leave_to_the_parent)


def end_process(code: int) -> NoReturn:
    """Ends this process now, with every process below it: Ray's own would outlive their driver by minutes."""
    for pid in _descendants(os.getpid()):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    os._exit(code)


def _descendants(root: int) -> list[int]:
    """The nearest first; empty where there is no /proc."""
    children: dict[int, list[int]] = {}
    with contextlib.suppress(OSError):
        for name in filter(str.isdigit, os.listdir("/proc")):
            # One may be gone by now.
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                # Its own name stands before, in brackets, with any characters in it.
                parent = int(file.read().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    found = children.get(root, [])
    for pid in found:
        found += children.get(pid, [])
    return found


def _say(line: str) -> None:
    # The terminal may be gone, or in the middle of a line.
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        # A live panel hides the cursor.
        print((_SHOW_CURSOR if sys.stderr.isatty() else "") + line, file=sys.stderr, flush=True)
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        sys.stdout.flush()
