"""metrics.jsonl in bounded memory: each number of a report as a series of at most ``MAX_BUCKETS`` buckets of steps."""

from __future__ import annotations

import collections
import json
import math
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from pipeline.report.values import listed, mapping, number

# Keys of a line whose numbers a report shows: for each task and variant, for each task, for all of them together.
_OF_VARIANTS = ("loss", "chance")
_OF_TASKS = ("examples", "tokens", "step_s", "data_wait_s")
_OF_ALL = ("wall_s", "learning_rate", "grad_norm", "tokens_per_s", "mfu", "step_s", "data_wait_s")
# Maximum number of buckets of a series; up to here every value is a bucket of its own.
MAX_BUCKETS = 1024
# Maximum number of buckets of the experts' loads, and of alarms that are kept.
_MAX_LOADS = 64
_MAX_ALARMS = 1000

# Keys from the outermost to the innermost.
Keys = tuple[str, ...]


def read_lines(path: Path) -> Iterator[dict]:
    """Yields the mappings of a file with one JSON value a line; nothing without the file."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            try:
                yield mapping(json.loads(line))
            except (ValueError, RecursionError):
                continue


class Series:
    """One number over the steps: buckets of neighbouring lines, twice as wide each time that there are too many.

    count: lines that had it. lost: those of them in which it was no finite number.
    """

    def __init__(self) -> None:
        self.count = 0
        self.lost = 0
        self._width = 1
        self._new = (array("d"), array("d"))
        # Rows: finite values, sum of their steps, their sum, lowest, highest; lost values at the end.
        self._buckets = np.zeros((0, 6))

    def add(self, step: float, value: float) -> None:
        """Takes the value of one line, NaN for what is no number."""
        self.count += 1
        self.lost += math.isnan(value)
        steps, values = self._new
        steps.append(step)
        values.append(value)
        if len(steps) == MAX_BUCKETS:
            self._take_new()

    def _take_new(self) -> None:
        steps, values = (np.array(column) for column in self._new)
        self._new = (array("d"), array("d"))
        known = np.isfinite(values)
        columns = (known, steps, np.where(known, values, 0.0), values, values, ~known)
        rows = np.column_stack([np.asarray(column, np.float64) for column in columns])
        rows[~known, 3], rows[~known, 4] = math.inf, -math.inf
        self._buckets = np.concatenate([self._buckets, _joined(rows, self._width)])
        while len(self._buckets) > MAX_BUCKETS:
            self._buckets = _joined(self._buckets, 2)
            self._width *= 2

    def _sorted(self) -> np.ndarray:
        if len(self._new[0]):
            self._take_new()
        rows = self._buckets
        lines = np.maximum(rows[:, 0] + rows[:, 5], 1)
        return rows[np.argsort(rows[:, 1] / lines, kind="stable")]

    @property
    def steps(self) -> np.ndarray:
        """The mean step of each bucket."""
        rows = self._sorted()
        return rows[:, 1] / np.maximum(rows[:, 0] + rows[:, 5], 1)

    @property
    def values(self) -> np.ndarray:
        """The mean of each bucket's finite values, NaN without any."""
        rows = self._sorted()
        return np.where(rows[:, 0] > 0, rows[:, 2] / np.maximum(rows[:, 0], 1), math.nan)

    @property
    def range(self) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and the highest finite value of each bucket, infinite without any."""
        rows = self._sorted()
        return rows[:, 3], rows[:, 4]

    @property
    def total(self) -> float:
        """The sum of all finite values."""
        return float(self._sorted()[:, 2].sum())

    @property
    def highest(self) -> float:
        """The highest finite value, NaN without any."""
        highest = self._sorted()[:, 4]
        return float(highest.max()) if self.count > self.lost else math.nan


def _joined(rows: np.ndarray, width: int) -> np.ndarray:
    """Buckets of ``width`` rows beside each other, the last one of fewer."""
    starts = np.arange(0, len(rows), width)
    if width == 1 or not len(rows):
        return rows
    out = np.add.reduceat(rows, starts)
    out[:, 3], out[:, 4] = np.minimum.reduceat(rows[:, 3], starts), np.maximum.reduceat(rows[:, 4], starts)
    return out


class Loads:
    """The loads of a modality's experts: sums over neighbouring lines, the last tenth of which is asked for."""

    def __init__(self) -> None:
        self.count = 0
        self._width = 1
        self._buckets: list[tuple[int, np.ndarray]] = []

    def add(self, load: list) -> None:
        """Takes the loads of one line. Those of another number of experts begin anew."""
        values = np.array([number(value) for value in load])
        if self._buckets and len(self._buckets[0][1]) != len(values):
            self._buckets, self.count, self._width = [], 0, 1
        self.count += 1
        if self._buckets and self._buckets[-1][0] < self._width:
            lines, sums = self._buckets.pop()
            self._buckets.append((lines + 1, sums + values))
        else:
            self._buckets.append((1, values))
        if len(self._buckets) > _MAX_LOADS:
            pairs = zip(self._buckets[::2], [*self._buckets[1::2], (0, 0 * values)], strict=False)
            self._buckets = [(a + b, x + y) for (a, x), (b, y) in pairs]
            self._width *= 2

    def last_tenth(self) -> np.ndarray:
        """The mean load of each expert in the last tenth of the lines, 1 = an even share."""
        lines, sums = 0, np.zeros_like(self._buckets[-1][1])
        for count, values in reversed(self._buckets):
            if lines >= max(1, self.count // 10):
                break
            lines, sums = lines + count, sums + values
        return sums / sums.mean() if sums.mean() > 0 else np.full(len(sums), math.nan)


class Metrics:
    """The numbers of a run.

    Lines without a step or a task are skipped. last_step: the highest step of a line. tasks: name → lines, in order of
    their first lines. alarms: (step, text), the first ones. num_alarms: of all lines. loads: modality → ``Loads``.
    """

    def __init__(self, rows: Iterable[dict]) -> None:
        self.tasks: collections.Counter[str] = collections.Counter()
        self.last_step = 0.0
        self.alarms: list[tuple[float, str]] = []
        self.num_alarms = 0
        self.loads: dict[str, Loads] = {}
        self._series: dict[tuple[Keys, str, str], Series] = collections.defaultdict(Series)
        for row in rows:
            step, task = number(row.get("step")), row.get("task")
            if math.isnan(step) or not isinstance(task, str):
                continue
            self.tasks[task] += 1
            self.last_step = max(self.last_step, step)
            self._take(step, task, row)
            self._take_groups(step, task, row)
            self._take_alarms(step, listed(row.get("alarms")))
        self._empty = Series()

    def _take(self, step: float, task: str, row: dict) -> None:
        variant = str(row.get("variant", ""))
        # A line without a loss has lost it.
        row = {"loss": None} | row
        for key in _OF_VARIANTS:
            if key in row:
                value = number(row[key])
                self._series[(key,), task, ""].add(step, value)
                self._series[(key,), task, variant or "–"].add(step, value)
        if "chance" in row:
            chance, loss = number(row["chance"]), number(row["loss"])
            self._series[("of_chance",), task, ""].add(step, loss / chance if chance > 0 else math.nan)
        for key in _OF_TASKS:
            if key in row:
                self._series[(key,), task, ""].add(step, number(row[key]))
        for key in _OF_ALL:
            if key in row:
                self._series[(key,), "", ""].add(step, number(row[key]))

    def _take_groups(self, step: float, task: str, row: dict) -> None:
        for pair, value in mapping(row.get("temperatures")).items():
            self._series[("temperatures", pair), "", ""].add(step, number(value))
        for term, value in mapping(row.get("losses")).items():
            self._series[("losses", term), task, ""].add(step, number(value))
        for modality, values in mapping(row.get("moe")).items():
            values = mapping(values)
            if "unrouted_fraction" in values:
                self._series[("moe", modality), "", ""].add(step, number(values["unrouted_fraction"]))
            if load := listed(values.get("expert_load")):
                self.loads.setdefault(modality, Loads()).add(load)

    def _take_alarms(self, step: float, texts: list) -> None:
        self.num_alarms += len(texts)
        if len(self.alarms) < _MAX_ALARMS:
            self.alarms += [(step, str(text)) for text in texts]

    def __len__(self) -> int:
        return self.tasks.total()

    def names(self, group: str) -> list[str]:
        """Every key that any line logged under "temperatures", "losses" or "moe", sorted."""
        return sorted({keys[1] for keys, _, _ in self._series if keys[0] == group and len(keys) > 1})

    def variants(self, task: str) -> list[str]:
        """The variants of a task, in order of their first lines; "–" stands for lines without one."""
        return [variant for keys, name, variant in self._series if keys == ("loss",) and name == task and variant]

    def series(self, *keys: str, task: str = "", variant: str = "") -> Series:
        """A number over the steps: of one task, of one of its variants, or of all; empty if no line logged it."""
        return self._series.get((keys, task, variant), self._empty)
