"""The files that a run writes line by line: metrics.jsonl and samples.jsonl."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.files import whole_file


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
    """Keeps the whole lines of steps up to ``keep_steps``. Returns the last step found, 0 without any."""
    last = 0
    if not path.exists():
        return last
    with (
        whole_file(path) as temporary,
        open(path, encoding="utf-8", errors="replace") as old,
        open(temporary, "w", encoding="utf-8") as new,
    ):
        for line in old:
            try:
                step = json.loads(line)["step"]
                keep, last = step <= keep_steps, max(last, step)
            except (ValueError, KeyError, TypeError):
                keep = False
            if keep:
                new.write(line if line.endswith("\n") else line + "\n")
    return last


def to_json_values(value: Any) -> Any:
    """Device arrays and numpy values as JSON values; arrays as nested lists, rounded to 7 digits."""
    if isinstance(value, dict):
        return {k: to_json_values(v) for k, v in value.items()}
    array = np.asarray(value)
    # Scalars such as the loss are not rounded: json writes the shortest text that reads back as the same double.
    return _rounded(array.tolist()) if array.ndim else array.item()


def _rounded(value: Any) -> Any:
    return [_rounded(v) for v in value] if isinstance(value, list) else float(f"{value:.7g}")
