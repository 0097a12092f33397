"""Reads the files of a run directory as far as possible, and derives the few numbers that a report needs.

Reports are also made of runs that died. So every file may be missing, empty, torn in its last line or hold NaN: what
cannot be read is left out.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path

import numpy as np
import yaml

from pipeline.train.goodput import Goodput, goodput


def number(value: object) -> float:
    """``value`` if it is a finite number, else NaN."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else math.nan


def mapping(value: object) -> dict:
    """``value`` if it is a mapping, with its keys as text, else an empty one."""
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else {}


def listed(value: object) -> list:
    """``value`` if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def records(value: object) -> list[dict]:
    """The mappings in a list."""
    return [mapping(item) for item in listed(value) if isinstance(item, dict)]


@dataclasses.dataclass(frozen=True)
class Run:
    """The content of a run directory.

    metrics: in order of the steps. experts: task → variant → modality → running means by layer (``ExpertLoads``).
    rejects: None if the file is not readable. goodput: None without a log of attempts.
    """

    config_text: str
    config: dict
    metrics: list[dict]
    summary: dict
    evaluations: list[dict]
    experts: dict
    rejects: list[dict] | None
    goodput: Goodput | None

    @functools.cached_property
    def rows(self) -> dict[str, list[dict]]:
        """The logged rows of each task."""
        rows: dict[str, list[dict]] = {}
        for row in self.metrics:
            rows.setdefault(row["task"], []).append(row)
        return rows

    @property
    def tasks(self) -> list[str]:
        """Every task that any file names, in the recipe's order."""
        named = [*mapping(self.config.get("tasks")), *mapping(self.summary.get("tasks"))]
        return list(dict.fromkeys([*named, *self.rows]))

    def task(self, name: str) -> dict:
        """A task's entry in the summary."""
        return mapping(mapping(self.summary.get("tasks")).get(name))

    def recipe(self, name: str) -> dict:
        """A task's entry in the recipe."""
        return mapping(mapping(self.config.get("tasks")).get(name))

    def data_set(self, name: str) -> str:
        """The data set of a task."""
        return str(self.task(name).get("data_set") or self.recipe(name).get("data_set") or "–")

    def values(self, *path: str, task: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one key (nested ones by path) wherever it was logged; NaN if its value is no number."""
        found = []
        *parents, key = path
        for row in self.metrics if task is None else self.rows.get(task, ()):
            inner = row
            for parent in parents:
                inner = mapping(inner.get(parent))
            if key in inner:
                found.append((row["step"], number(inner[key])))
        pairs = np.array(found, dtype=np.float64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    def keys(self, *path: str) -> list[str]:
        """Every key that any row logged under ``path``, sorted."""
        names = {}
        for row in self.metrics:
            for key in path:
                row = mapping(row.get(key))
            names.update(row)
        return sorted(names)


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _rejects(path: Path) -> list[dict] | None:
    try:
        # Imported here: training also runs on machines without pyarrow.
        import pyarrow.parquet as pq

        return pq.read_table(path).to_pylist()
    except (ImportError, OSError, ValueError):
        return None


def read_run(run_dir: Path) -> Run:
    """Reads the files of a run directory; lines of metrics without step or task are skipped."""
    config_text = _text(run_dir / "config.yaml")
    try:
        config = mapping(yaml.safe_load(config_text))
    except yaml.YAMLError:
        config = {}
    rows = [mapping(_json(line)) for line in _text(run_dir / "metrics.jsonl").split("\n")]
    rows = [row for row in rows if math.isfinite(number(row.get("step"))) and isinstance(row.get("task"), str)]
    return Run(
        config_text=config_text,
        config=config,
        metrics=sorted(rows, key=lambda row: row["step"]),
        summary=mapping(_json(_text(run_dir / "summary.json"))),
        evaluations=records(_json(_text(run_dir / "eval.json"))),
        experts=mapping(_json(_text(run_dir / "experts.json"))),
        rejects=_rejects(run_dir / "quarantine.parquet"),
        goodput=goodput(run_dir),
    )


def last_tenth(items: list) -> list:
    """The last tenth of a list, at least one item."""
    return items[-max(1, len(items) // 10) :]


def median(values: np.ndarray) -> float:
    """The median of the finite values, NaN without any."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan


def first_and_last_tenth(values: np.ndarray) -> tuple[float, float]:
    """Medians of the first and the last tenth (at least one) of all logged values: a diverged end shows as NaN."""
    size = max(1, len(values) // 10)
    return median(values[:size]), median(values[-size:])


def steps_done(run: Run) -> int:
    """The number of steps by the summary, or the last logged step if that is larger: not every step is logged."""
    counted = np.nansum([number(run.task(name).get("steps")) for name in run.tasks])
    logged = run.metrics[-1]["step"] if run.metrics else 0
    return int(max(counted, logged))


def shares(run: Run) -> dict[str, tuple[float, float, float]]:
    """Per task: the expected share of the steps, its binomial standard deviation, and the actual share."""
    weights = {name: number(run.task(name).get("weight", run.recipe(name).get("weight", 1.0))) for name in run.tasks}
    steps = {name: number(run.task(name).get("steps", len(run.rows.get(name, ())))) for name in run.tasks}
    weight_sum, step_sum = np.nansum(list(weights.values())), np.nansum(list(steps.values()))
    if not weight_sum > 0 or not step_sum > 0:
        return {}
    expected = {name: weight / weight_sum for name, weight in weights.items()}
    return {
        name: (share, math.sqrt(max(0.0, share * (1 - share)) / step_sum), steps[name] / step_sum)
        for name, share in expected.items()
    }
