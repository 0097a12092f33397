"""Reads the files of a run directory as far as possible, and derives the few numbers that a report needs.

Reports are also made of runs that died. So every file may be missing, empty, torn in its last line or hold NaN: what
cannot be read is left out.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import yaml

from pipeline.report.metrics_file import Metrics, read_lines
from pipeline.report.values import mapping, number, records
from pipeline.train.goodput import Goodput, goodput

# Rejects that are read one by one.
MAX_REJECTS = 100


@dataclasses.dataclass(frozen=True)
class Rejects:
    """The content of quarantine.parquet. reasons: (data set, reason) → rejects. first: the first ``MAX_REJECTS``."""

    count: int
    reasons: collections.Counter
    first: list[dict]


@dataclasses.dataclass(frozen=True)
class Run:
    """The content of a run directory.

    experts: task → variant → modality → running means by layer (``ExpertLoads``).
    rejects: None if the file is not readable. goodput: None without a log of attempts.
    """

    config_text: str
    config: dict
    metrics: Metrics
    summary: dict
    evaluations: list[dict]
    experts: dict
    rejects: Rejects | None
    goodput: Goodput | None

    @property
    def tasks(self) -> list[str]:
        """Every task that any file names, in the recipe's order."""
        named = [*mapping(self.config.get("tasks")), *mapping(self.summary.get("tasks"))]
        return list(dict.fromkeys([*named, *self.metrics.tasks]))

    def task(self, name: str) -> dict:
        """A task's entry in the summary."""
        return mapping(mapping(self.summary.get("tasks")).get(name))

    def recipe(self, name: str) -> dict:
        """A task's entry in the recipe."""
        return mapping(mapping(self.config.get("tasks")).get(name))

    def data_set(self, name: str) -> str:
        """The data set of a task."""
        return str(self.task(name).get("data_set") or self.recipe(name).get("data_set") or "–")


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _rejects(path: Path) -> Rejects | None:
    try:
        # Imported here: training also runs on machines without pyarrow.
        import pyarrow.parquet as pq

        reasons: collections.Counter = collections.Counter()
        with path.open("rb") as content, pq.ParquetFile(content) as file:
            first = next(file.iter_batches(batch_size=MAX_REJECTS), None)
            for batch in file.iter_batches(columns=["data_set", "reason"]):
                columns = [map(str, batch[name].to_pylist()) for name in batch.schema.names]
                reasons.update(zip(*columns, strict=True))
            return Rejects(file.metadata.num_rows, reasons, [] if first is None else first.to_pylist())
    except (ImportError, OSError, ValueError):
        return None


def read_run(run_dir: Path) -> Run:
    """Reads the files of a run directory; the metrics line by line."""
    config_text = _text(run_dir / "config.yaml")
    try:
        config = mapping(yaml.safe_load(config_text))
    except yaml.YAMLError:
        config = {}
    return Run(
        config_text=config_text,
        config=config,
        metrics=Metrics(read_lines(run_dir / "metrics.jsonl")),
        summary=mapping(_json(_text(run_dir / "summary.json"))),
        evaluations=records(_json(_text(run_dir / "eval.json"))),
        experts=mapping(_json(_text(run_dir / "experts.json"))),
        rejects=_rejects(run_dir / "quarantine.parquet"),
        goodput=goodput(run_dir),
    )


def last_tenth(items: np.ndarray) -> np.ndarray:
    """The last tenth of an array, at least one item."""
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
    logged = run.metrics.steps[-1] if len(run.metrics) else 0
    return int(max(counted, logged))


def shares(run: Run) -> dict[str, tuple[float, float, float]]:
    """Per task: the expected share of the steps, its binomial standard deviation, and the actual share."""
    weights = {name: number(run.task(name).get("weight", run.recipe(name).get("weight", 1.0))) for name in run.tasks}
    steps = {name: number(run.task(name).get("steps", run.metrics.num_lines(name))) for name in run.tasks}
    weight_sum, step_sum = np.nansum(list(weights.values())), np.nansum(list(steps.values()))
    if not weight_sum > 0 or not step_sum > 0:
        return {}
    expected = {name: weight / weight_sum for name, weight in weights.items()}
    return {
        name: (share, math.sqrt(max(0.0, share * (1 - share)) / step_sum), steps[name] / step_sum)
        for name, share in expected.items()
    }
