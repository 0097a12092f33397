"""The files that a run writes line by line: metrics.jsonl and samples.jsonl."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.store.log import cut_log, lines_from_end, open_log
from pipeline.store.path import run_path


class StepLog:
    """A file with one JSON object per line, cut back on resume so that it holds each step once.

    last_step: last step in the file before it was cut back, 0 if it held none.
    """

    def __init__(self, path: Path, *, keep_steps: int):
        """keep_steps: drop the lines of later steps (written by a run that died after its last checkpoint)."""
        self.path = run_path(path)
        self.last_step = cut_back(self.path, keep_steps=keep_steps)
        self._log = open_log(self.path)

    def write(self, record: dict) -> None:
        """Appends one line, visible to readers at once, in a bucket after seconds."""
        self._log.append(json.dumps(record).encode() + b"\n")

    def sync(self) -> None:
        """Flushes to disk. Order contract: called before the checkpoint that covers these steps is stored."""
        self._log.sync()

    def close(self) -> None:
        """Closes the file."""
        self._log.close()


def cut_back(path: Path, *, keep_steps: int) -> int:
    """Cuts off the lines of steps after ``keep_steps``, and a torn end. Returns the last step found, 0 without any.

    Reads from the end of the log, whose steps rise, so the cost does not grow with the run.
    """
    last = 0

    def cut(file: BinaryIO) -> bool:
        nonlocal last
        for start, line in lines_from_end(file):
            step = _step(line)
            last = max(last, step or 0)
            if step is not None and step <= keep_steps:
                file.truncate(start + len(line))
                file.seek(0, os.SEEK_END)
                file.write(b"\n")
                return True
        file.truncate(0)
        return False

    with contextlib.suppress(FileNotFoundError):
        cut_log(path, cut)
    return last


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
