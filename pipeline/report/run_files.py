"""Reads the files of a run directory as far as possible, and derives the few numbers that a report needs.

Reports are also made of runs that died. So every file may be missing, empty, torn in its last line or hold NaN: what
cannot be read is left out.
"""

from __future__ import annotations

import collections
import dataclasses
import fcntl
import json
import math
from pathlib import Path

import numpy as np
import yaml

from pipeline.report.metrics_file import Metrics, read_lines
from pipeline.report.values import mapping, number, records
from pipeline.train.attempts import command_facts
from pipeline.train.goodput import Goodput, goodput

# Maximum number of rejects that are read one by one.
MAX_REJECTS = 20
# The file of the pictures of a run, in its directory (``showcase``).
SHOWCASE = "showcase.json"


@dataclasses.dataclass(frozen=True)
class Rejects:
    """The content of quarantine.parquet. reasons: (data set, reason) → rejects. first: the first ``MAX_REJECTS``."""

    count: int
    reasons: collections.Counter
    first: list[dict]


@dataclasses.dataclass(frozen=True)
class Run:
    """The content of a run directory.

    curve: evaluations between steps. experts: task → variant → modality → running means by layer (``ExpertLoads``).
    rejects: None if the file is not readable. goodput: None without a log of attempts. commands: facts of each command
    (``provenance``), the latest last. evaluated: whether an evaluation has ended. running: a process holds the
    directory.
    """

    name: str
    config_text: str
    config: dict
    metrics: Metrics
    summary: dict
    evaluated: bool
    evaluations: list[dict]
    curve: list[dict]
    experts: dict
    rejects: Rejects | None
    goodput: Goodput | None
    showcase: dict
    commands: list[dict]
    running: bool

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

    @property
    def steps_done(self) -> int:
        """The number of steps by the summary, or the last logged step if that is larger: not every step is logged."""
        counted = np.nansum([number(self.task(name).get("steps")) for name in self.tasks])
        return int(max(counted, self.metrics.last_step))

    @property
    def steps_planned(self) -> float:
        """The number of steps of the recipe, NaN if it is not known."""
        return number(mapping(self.config.get("train")).get("num_steps"))

    @property
    def outcome(self) -> str:
        """How the latest attempt ended; empty if it has not, or if nothing is known."""
        return (self.goodput.attempts[-1].outcome or "") if self.goodput else ""

    @property
    def state(self) -> str:
        """One of "complete", "not evaluated", "running", "failed", "stopped", "ended without a word", "not known"."""
        if self.steps_done >= self.steps_planned and self.evaluated:
            return "complete"
        # The command that tells of its end holds the directory a moment longer.
        for word in ("failed", "stopped"):
            if self.outcome.startswith(word):
                return word
        if self.running:
            return "running"
        if self.steps_done >= self.steps_planned:
            return "not evaluated"
        return "not known" if math.isnan(self.steps_planned) or not self.goodput else "ended without a word"


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
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


def _is_held(run_dir: Path) -> bool:
    """Whether a process holds the run directory (``run_dir.lock_run_dir``)."""
    try:
        with open(run_dir / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def read_run(run_dir: Path) -> Run:
    """Reads the files of a run directory; the metrics line by line."""
    config_text, evaluations = _text(run_dir / "config.yaml"), _json(_text(run_dir / "eval.json"))
    try:
        config = mapping(yaml.safe_load(config_text))
    except yaml.YAMLError:
        config = {}
    return Run(
        name=run_dir.resolve().name,
        config_text=config_text,
        config=config,
        metrics=Metrics(read_lines(run_dir / "metrics.jsonl")),
        summary=mapping(_json(_text(run_dir / "summary.json"))),
        evaluated=isinstance(evaluations, list),
        evaluations=records(evaluations),
        curve=list(read_lines(run_dir / "eval_curve.jsonl")),
        experts=mapping(_json(_text(run_dir / "experts.json"))),
        rejects=_rejects(run_dir / "quarantine.parquet"),
        goodput=goodput(run_dir),
        showcase=mapping(_json(_text(run_dir / SHOWCASE))),
        commands=command_facts(run_dir),
        running=_is_held(run_dir),
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
