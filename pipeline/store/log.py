"""Logs that only grow: a file, or segments in a bucket, where nothing can be appended to.

A segment is put again at each flush until it is large enough; then the next one begins. So a long log has few objects,
and a flush sends little. Lines never cross segments.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from pipeline.store.path import ObjectPath

# Minimum bytes of a segment that is finished.
_SEGMENT_BYTES = 1 << 18
# Maximum seconds for which lines that nobody waits for are held back.
_FLUSH_S = 10.0


class Log(Protocol):
    """Takes whole lines."""

    def append(self, lines: bytes) -> None:
        """Appends; readers see it soon. Raises OSError."""
        ...

    def sync(self) -> None:
        """Returns once all that was appended survives a kill and a power cut. Raises OSError."""
        ...

    def close(self) -> None:
        """Writes what is pending, and ends."""
        ...


class FileLog:
    """A log on a disk, from the end of its last whole line on: one that a kill cut off was never acknowledged."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b", buffering=0)
        self._file.truncate(_whole_lines(self._file))

    def append(self, lines: bytes) -> None:
        if (written := self._file.write(lines)) != len(lines):
            raise OSError(f"only {written} of {len(lines)} bytes were written")

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class ObjectLog:
    """A log in a bucket."""

    def __init__(self, path: ObjectPath) -> None:
        self._path = path
        keys = path.segments()
        self._number = int(keys[-1].rpartition("/")[2]) if keys else 0
        self._segment = bytearray(path.store.get(keys[-1]) or b"" if keys else b"")
        self._flushed, self._flushed_at = len(self._segment), time.monotonic()

    def append(self, lines: bytes) -> None:
        if self._flushed == len(self._segment) >= _SEGMENT_BYTES:
            self._number, self._segment, self._flushed = self._number + 1, bytearray(), 0
        self._segment += lines
        if time.monotonic() - self._flushed_at >= _FLUSH_S:
            self.sync()

    def sync(self) -> None:
        if self._flushed < len(self._segment):
            self._path.store.put(segment_key(self._path, self._number), bytes(self._segment))
            self._flushed = len(self._segment)
        self._flushed_at = time.monotonic()

    def close(self) -> None:
        self.sync()


def segment_key(path: ObjectPath, number: int) -> str:
    """The key of a log's segment, so that keys sort as numbers do."""
    return f"{path.key}/{number:09d}"


def open_log(path: Path) -> Log:
    """A log to append to."""
    return ObjectLog(path) if isinstance(path, ObjectPath) else FileLog(path)


def cut_log(path: Path, cut: Callable[[BinaryIO], bool]) -> None:
    """Cuts a log back from its end on. cut: truncates a file, and says whether anything of it is kept."""
    if not isinstance(path, ObjectPath):
        with open(path, "r+b") as file:
            cut(file)
        return
    for key in reversed(path.segments()):
        before = path.store.get(key) or b""
        segment = io.BytesIO(before)
        kept = cut(segment)
        if not kept:
            path.store.delete([key])
        elif segment.getvalue() != before:
            path.store.put(key, segment.getvalue())
        if kept:
            return


def lines_from_end(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yields (place in the file, line without its end) of every line, the last one first."""
    start, size, rest = file.seek(0, os.SEEK_END), 1 << 16, b""
    while start:
        # Blocks grow, so that a long line or hole is not copied again and again.
        size, begin = 2 * size, max(0, start - size)
        file.seek(begin)
        rest = file.read(start - begin) + rest
        start = begin
        stop = len(rest)
        while (end := rest.rfind(b"\n", 0, stop)) >= 0:
            yield start + end + 1, rest[end + 1 : stop]
            stop = end
        rest = rest[:stop]
    yield 0, rest


def _whole_lines(file: BinaryIO | io.FileIO) -> int:
    """The number of bytes of a file up to the end of its last whole line."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - (1 << 16))
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
