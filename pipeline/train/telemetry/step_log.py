"""The files that a run writes line by line: metrics.jsonl and samples.jsonl."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


class StepLog:
    """A file with one JSON object per line, cut back on resume so that it holds each step once.

    last_step: last step in the file before it was cut back, 0 if it held none.
    """

    def __init__(self, path: Path, *, keep_steps: int):
        """keep_steps: drop the lines of later steps (written by a run that died after its last checkpoint)."""
        self.path = Path(path)
        self.last_step = cut_back(self.path, keep_steps=keep_steps)
        self._file = open(self.path, "a", encoding="utf-8")

    def write(self, record: dict) -> None:
        """Appends one line, immediately visible to readers."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Flushes to disk. Order contract: called before the checkpoint that covers these steps is stored."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def cut_back(path: Path, *, keep_steps: int) -> int:
    """Cuts off the lines of steps after ``keep_steps``, and a torn end. Returns the last step found, 0 without any.

    Reads from the end of the file, whose steps rise, so the cost does not grow with the run.
    """
    try:
        file = open(path, "r+b")
    except FileNotFoundError:
        return 0
    last = 0
    with file:
        for start, line in _lines_from_end(file):
            step = _step(line)
            last = max(last, step or 0)
            if step is not None and step <= keep_steps:
                file.truncate(start + len(line))
                file.seek(0, os.SEEK_END)
                file.write(b"\n")
                return last
        file.truncate(0)
    return last


def _lines_from_end(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
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


def _step(line: bytes) -> int | None:
    """The step of a line, None if it has none."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def to_json_values(value: Any) -> Any:
    """Device arrays and numpy values as JSON values; arrays as nested lists, rounded to 7 digits."""
    if isinstance(value, dict):
        return {k: to_json_values(v) for k, v in value.items()}
    array = np.asarray(value)
    # Scalars such as the loss are not rounded: json writes the shortest text that reads back as the same double.
    return _rounded(array.tolist()) if array.ndim else array.item()


def _rounded(value: Any) -> Any:
    return [_rounded(v) for v in value] if isinstance(value, list) else float(f"{value:.7g}")
