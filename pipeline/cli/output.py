"""Standard output and error of a command, which goes on when nobody reads them any more."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

# Errors of a reader that has gone: a closed pipe, a terminal that was closed.
_GONE = (errno.EPIPE, errno.EIO)


class _Lasting(io.FileIO):
    """A file that is written to while it can be. fault: the first error that lost text which someone may miss."""

    fault: OSError | None = None

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as e:
            if e.errno not in _GONE:
                self.fault = self.fault or e
            return memoryview(data).nbytes


class Output:
    """The streams that have been replaced."""

    def __init__(self) -> None:
        self._files: list[_Lasting] = []

    def replace(self, name: str) -> None:
        """Replaces a stream of ``sys``; leaves alone one that is no file of the system's, as in tests and notebooks."""
        stream = getattr(sys, name)
        buffer = getattr(stream, "buffer", None)
        # Python's own output is unbuffered where it was told so.
        if type(getattr(buffer, "raw", buffer)) is not io.FileIO:
            return
        with contextlib.suppress(OSError):
            stream.flush()
        file = _Lasting(stream.fileno(), "w", closefd=False)
        self._files.append(file)
        text = io.TextIOWrapper(
            file if type(buffer) is io.FileIO else io.BufferedWriter(file),
            encoding=stream.encoding,
            # A locale that lacks a character of a table is no reason to fail.
            errors="backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, text)

    def fault(self) -> OSError | None:
        """What kept text from being written, but for a reader that has gone."""
        for stream in (sys.stdout, sys.stderr):
            # A stream that was closed, or is none.
            with contextlib.suppress(AttributeError, OSError, ValueError):
                stream.flush()
        return next((file.fault for file in self._files if file.fault), None)


def _open_closed() -> None:
    """Opens the null device in place of standard streams that the caller has closed.

    A checkpoint that is opened next would get their number otherwise, and all that a library prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is this one. Processes that are started have it too.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


@contextlib.contextmanager
def lasting_output() -> Iterator[Output]:
    """Lets prints inside the block succeed whatever becomes of the terminal, pipe or file that they go to."""
    _open_closed()
    before, output = (sys.stdout, sys.stderr), Output()
    for name in ("stdout", "stderr"):
        output.replace(name)
    try:
        yield output
    finally:
        output.fault()
        sys.stdout, sys.stderr = before
