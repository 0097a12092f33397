"""The files that a run writes line by line: metrics.jsonl and samples.jsonl."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from pipeline.files import whole_file


class StepLog:
    """A file of one JSON object a line, cut back on resume so that each step stands once."""

    def __init__(self, path: Path, *, keep_steps: int):
        """keep_steps: lines of later steps (from a run that died after its last checkpoint) are dropped.

        last_step: the last step that stood there before, 0 where none did.
        """
        self.path = Path(path)
        self.last_step = cut_back(self.path, keep_steps=keep_steps)
        self._file = open(self.path, "a", encoding="utf-8")

    def write(self, record: dict) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Order contract: what a checkpoint covers is on disk before the checkpoint is."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def cut_back(path: Path, *, keep_steps: int) -> int:
    """Keeps the whole lines of the steps up to ``keep_steps``. Returns the last step there was, 0 without any."""
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


def plain(value):
    """Device arrays and numpy values as JSON values; arrays as nested lists, rounded to 7 digits."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    array = np.asarray(value)
    # The loss itself is written as the shortest text that gives the same double back: comparable bit for bit.
    return _rounded(array.tolist()) if array.ndim else array.item()


def _rounded(value):
    return [_rounded(v) for v in value] if isinstance(value, list) else float(f"{value:.7g}")
