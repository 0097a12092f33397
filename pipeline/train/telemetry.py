"""What a run writes while it runs: metrics.jsonl, samples.jsonl and the progress display."""

from __future__ import annotations

import collections
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from pipeline.files import whole_file


class StepLog:
    """A file of one JSON object a line, cut back on resume so that each step stands once."""

    def __init__(self, path: Path, *, keep_steps: int):
        """keep_steps: lines of later steps (from a run that died after its last checkpoint) are dropped."""
        self.path = Path(path)
        cut_back(self.path, keep_steps=keep_steps)
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


def cut_back(path: Path, *, keep_steps: int) -> None:
    """Keeps the whole lines of the steps up to ``keep_steps``."""
    if not path.exists():
        return
    with (
        whole_file(path) as temporary,
        open(path, encoding="utf-8", errors="replace") as old,
        open(temporary, "w", encoding="utf-8") as new,
    ):
        for line in old:
            try:
                keep = json.loads(line)["step"] <= keep_steps
            except (ValueError, KeyError, TypeError):
                keep = False
            if keep:
                new.write(line if line.endswith("\n") else line + "\n")


def plain(value):
    """Device arrays and numpy values as JSON values, rounded to 7 digits where they are small arrays."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    array = np.asarray(value)
    if array.ndim:
        return [float(f"{v:.7g}") for v in array.ravel()]
    # The loss itself is written as the shortest text that gives the same double back: comparable bit for bit.
    return array.item()


# What the progress line speaks of: the waits of the start are soon forgotten.
_RECENT_STEPS = 64
# Fewer steps say nothing of the time left.
_STEPS_TO_KNOW = 8


class Progress:
    """One line of state on a terminal (rich), or plain lines every ``every_s`` seconds elsewhere."""

    def __init__(self, *, mode: str, num_steps: int, every_s: float, start_step: int = 0):
        terminal = sys.stderr.isatty()
        self._mode = ("rich" if terminal else "plain") if mode == "auto" else mode
        self._num_steps, self._every_s = num_steps, every_s
        self._last, self._rich = 0.0, None
        # (examples, seconds waiting for data, seconds in all) of the last steps.
        self._recent: collections.deque = collections.deque(maxlen=_RECENT_STEPS)
        if self._mode == "rich":
            self._rich = _RichLine(num_steps=num_steps, start_step=start_step)

    def update(self, record: dict) -> None:
        wait_s = record["data_wait_s"]
        self._recent.append((record["examples"], wait_s, wait_s + record["step_s"]))
        now = time.monotonic()
        last = record["step"] == self._num_steps
        if self._mode == "none" or (now - self._last < (0.1 if self._rich else self._every_s) and not last):
            return
        self._last = now
        examples, wait_s, busy_s = np.sum(self._recent, axis=0)
        steps_left = self._num_steps - record["step"]
        known = len(self._recent) >= _STEPS_TO_KNOW or not steps_left
        left = _clock(busy_s / len(self._recent) * steps_left) if known else "?"
        wait, rate = wait_s / max(busy_s, 1e-9), examples / max(busy_s, 1e-9)
        text = (
            f"{record['task']}/{record['variant']} loss {record['loss']:.4f} | {rate:.0f} examples/s | "
            f"data wait {wait:.0%} | {left} left"
        )
        if self._rich:
            self._rich.show(record["step"], text)
        else:
            print(f"step {record['step']}/{self._num_steps} | {text}", flush=True)

    def close(self) -> None:
        if self._rich:
            self._rich.close()


class _RichLine:
    def __init__(self, *, num_steps: int, start_step: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._progress = RichProgress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
        )
        self._progress.start()
        self._task = self._progress.add_task("waiting for the first batch", total=num_steps, completed=start_step)

    def show(self, step: int, text: str) -> None:
        self._progress.update(self._task, completed=step, description=text)

    def close(self) -> None:
        self._progress.stop()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
