"""metrics.jsonl in columns: the numbers that a report shows, 12 bytes each, where lines as mappings take kilobytes."""

from __future__ import annotations

import collections
import json
import math
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from pipeline.report.values import listed, mapping, number

# Keys of a line whose numbers a report shows, and those that hold named numbers.
_KEYS = (
    *("loss", "chance", "examples", "tokens", "step_s", "data_wait_s", "wall_s", "learning_rate", "grad_norm"),
    *("tokens_per_s", "mfu"),
)
_GROUPS = ("temperatures", "losses")
# Maximum number of lines by which the experts of a modality are judged, and of alarms that are kept.
_MAX_LOADS = 10_000
_MAX_ALARMS = 10_000

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


class Metrics:
    """The numbers of a run in order of their steps.

    Lines without a step or a task are skipped. steps: of every line. tasks: name → code, in order of their first lines.
    alarms: (step, text), those of the first lines. num_alarms: of all lines. loads: modality → the loads of its experts
    that were logged last. num_loads: modality → lines with such loads.
    """

    def __init__(self, rows: Iterable[dict]) -> None:
        self.tasks: dict[str, int] = {}
        self.alarms: list[tuple[float, str]] = []
        self.num_alarms = 0
        self.loads: dict[str, collections.deque[list]] = {}
        self.num_loads: collections.Counter = collections.Counter()
        self._groups: dict[str, dict[str, None]] = {"moe": {}} | {name: {} for name in _GROUPS}
        columns: dict[Keys, tuple[array, array]] = {}
        steps, codes = array("d"), array("I")
        for row in rows:
            step, task = number(row.get("step")), row.get("task")
            if math.isnan(step) or not isinstance(task, str):
                continue
            for keys, value in self._numbers(row):
                if keys not in columns:
                    columns[keys] = array("I"), array("d")
                columns[keys][0].append(len(steps))
                columns[keys][1].append(value)
            self._take_alarms(step, listed(row.get("alarms")))
            steps.append(step)
            codes.append(self.tasks.setdefault(task, len(self.tasks)))
        self._sort(np.array(steps), np.array(codes, np.int64), columns)

    def _numbers(self, row: dict) -> Iterator[tuple[Keys, float]]:
        """Yields (keys, number) of what a report shows of a line; NaN for what is none."""
        for key in _KEYS:
            if key in row:
                yield (key,), number(row[key])
        for group in _GROUPS:
            for key, value in mapping(row.get(group)).items():
                self._groups[group][key] = None
                yield (group, key), number(value)
        for modality, values in mapping(row.get("moe")).items():
            self._groups["moe"][modality] = None
            values = mapping(values)
            if "unrouted_fraction" in values:
                yield ("moe", modality, "unrouted_fraction"), number(values["unrouted_fraction"])
            if load := listed(values.get("expert_load")):
                self.num_loads[modality] += 1
                self.loads.setdefault(modality, collections.deque(maxlen=_MAX_LOADS)).append(load)

    def _take_alarms(self, step: float, texts: list) -> None:
        self.num_alarms += len(texts)
        if len(self.alarms) < _MAX_ALARMS:
            self.alarms += [(step, str(text)) for text in texts]

    def _sort(self, steps: np.ndarray, codes: np.ndarray, columns: dict[Keys, tuple[array, array]]) -> None:
        order = np.argsort(steps, kind="stable")
        self.steps, self._codes = steps[order], codes[order]
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        self._columns: dict[Keys, tuple[np.ndarray, np.ndarray]] = {}
        for keys in list(columns):
            lines, values = columns.pop(keys)
            rows = place[np.array(lines)]
            by_step = np.argsort(rows)
            self._columns[keys] = rows[by_step], np.array(values)[by_step]
        self.alarms.sort(key=lambda alarm: alarm[0])

    def __len__(self) -> int:
        return len(self.steps)

    def names(self, group: str) -> list[str]:
        """Every key that any line logged under "temperatures", "losses" or "moe", sorted."""
        return sorted(self._groups[group])

    def num_lines(self, task: str) -> int:
        """The number of lines of a task."""
        return int(np.sum(self._codes == self.tasks.get(task, -1)))

    def values(self, *keys: str, task: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(steps, numbers) of the lines that logged a key, of one task or of all; NaN for what is no number."""
        if keys not in self._columns:
            return np.zeros(0), np.zeros(0)
        rows, values = self._columns[keys]
        if task is not None:
            mine = self._codes[rows] == self.tasks.get(task, -1)
            rows, values = rows[mine], values[mine]
        return self.steps[rows], values

    def all_values(self, key: str, *, task: str | None = None) -> np.ndarray:
        """The numbers of a key in all lines, of one task or of all; NaN for those without it."""
        out = np.full(len(self), math.nan)
        if (key,) in self._columns:
            rows, values = self._columns[key,]
            out[rows] = values
        return out if task is None else out[self._codes == self.tasks.get(task, -1)]

    def tasks_where(self, lines: np.ndarray) -> list[str]:
        """The tasks of the lines where True, in order of their first such line."""
        codes, first = np.unique(self._codes[lines], return_index=True)
        names = list(self.tasks)
        return [names[code] for code in codes[np.argsort(first)].tolist()]
