"""Writers of metrics beside the run's own metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

A new one is a class with ``write`` and ``close`` and an entry of ``WRITERS``.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import queue
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import yaml

from pipeline.errors import one_line
from pipeline.files import cache_dir, write_bytes
from pipeline.store.path import local_folder, publish

# Maximum number of points that a writer may be behind before it is given up.
_MAX_WAITING = 10_000
# Seconds for a writer to finish at the end of a run.
_CLOSE_S = 60.0

# Keys of a record, by the first part of the name under which ``scalars`` files them.
_TASK_KEYS = ("loss", "grad_norm", "data_wait_s", "task_steps", "expected_steps")
_VARIANT_KEYS = ("loss", "step_s", "examples_per_s", "tokens_per_s", "mfu")
_RUN_KEYS = ("learning_rate", "rss_bytes", "device_bytes", "device_peak_bytes")


class Writer(Protocol):
    """Takes the scalars of one step after the other."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one step. values: name → finite number."""
        ...

    def close(self) -> None:
        """Writes what is pending and ends the session."""
        ...


@dataclasses.dataclass(frozen=True)
class RunIdentity:
    """The run whose metrics are written.

    project: the project under which services file it. start_step: steps completed before this process; points of later
    steps are obsolete. logged_step: last step that an earlier process may have written; services keep its points.
    """

    run_dir: Path
    project: str
    start_step: int
    logged_step: int

    def kept_id(self, writer: str, make: Callable[[], str]) -> str:
        """The name by which a service knows this run, made once and kept in the run directory."""
        path = self.run_dir / f"{writer}.id"
        if not path.exists():
            write_bytes(path, make().encode())
        return path.read_text()


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run: RunIdentity):
        from tensorboardX import SummaryWriter

        # TensorBoard hides the points of these steps in earlier files.
        purge = run.start_step + 1
        self._target = run.run_dir / "tensorboard"
        self._folder = local_folder(run.run_dir, cache_dir()) / "tensorboard"
        self._writer = SummaryWriter(str(self._folder), purge_step=purge, flush_secs=2)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Ends the session."""
        self._writer.close()
        publish(self._folder, self._target)


class WandB:
    """A run of Weights & Biases, configured by its own variables (WANDB_MODE, WANDB_API_KEY, ...)."""

    def __init__(self, run: RunIdentity):
        import wandb

        config = run.run_dir / "config.yaml"
        self._logged_step = run.logged_step
        self._run = wandb.init(
            project=run.project,
            id=run.kept_id("wandb", lambda: uuid.uuid4().hex[:12]),
            resume="allow",
            name=run.run_dir.name,
            dir=str(local_folder(run.run_dir, cache_dir())),
            config=yaml.safe_load(config.read_text(encoding="utf-8")) if config.exists() else None,
            # Do not capture the output of the run.
            settings=wandb.Settings(console="off", quiet=True),
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one step."""
        if step > self._logged_step:
            self._run.log(values, step=step)

    def close(self) -> None:
        """Ends the session."""
        self._run.finish()


class MLflow:
    """A run of the MLflow server or store that MLFLOW_TRACKING_URI names."""

    def __init__(self, run: RunIdentity):
        from mlflow import MlflowClient

        self._client, self._logged_step = MlflowClient(), run.logged_step
        self._run_id = run.kept_id("mlflow", lambda: self._new_run(run))
        self._client.update_run(self._run_id, status="RUNNING")

    def _new_run(self, run: RunIdentity) -> str:
        found = self._client.get_experiment_by_name(run.project)
        experiment = found.experiment_id if found else self._client.create_experiment(run.project)
        return self._client.create_run(experiment, run_name=run.run_dir.name).info.run_id

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one step."""
        from mlflow.entities import Metric

        if step > self._logged_step:
            now_ms = int(time.time() * 1000)
            metrics = [Metric(name, value, now_ms, step) for name, value in values.items()]
            self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        """Ends the session."""
        self._client.set_terminated(self._run_id)


# Name in a recipe → (class, module that it needs, argument of pip that installs it).
WRITERS = {
    "tensorboard": (TensorBoard, "tensorboardX", "tensorboardX"),
    "wandb": (WandB, "wandb", "'imp-pretrain[wandb]'"),
    "mlflow": (MLflow, "mlflow", "'imp-pretrain[mlflow]'"),
}


def missing(names: tuple[str, ...]) -> dict[str, str]:
    """Writers that cannot be imported here → the command that installs them."""
    return {name: f"pip install {WRITERS[name][2]}" for name in names if not _importable(name)}


def default_writers() -> tuple[str, ...]:
    """TensorBoard if it is installed."""
    return ("tensorboard",) if _importable("tensorboard") else ()


def _importable(name: str) -> bool:
    return importlib.util.find_spec(WRITERS[name][1]) is not None


class BackgroundWriter:
    """Runs a writer in a background thread: if it fails, hangs or is slow, its points are lost, never a step.

    A failure is reported in one line, and the writer gets no more points.
    """

    def __init__(self, name: str, open_writer: Callable[[], Writer]):
        self._name = name
        self._dropped = False
        self._queue: queue.Queue = queue.Queue(maxsize=_MAX_WAITING)
        self._thread = threading.Thread(target=self._work, args=(open_writer,), name=f"writer-{name}", daemon=True)
        self._thread.start()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Queues one step and returns immediately."""
        self._put((step, values))

    def close(self) -> None:
        """Waits until the queue is written, for a limited time."""
        self._put(None)
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            self._drop("did not finish in time")

    def _put(self, point: tuple[int, dict[str, float]] | None) -> None:
        try:
            if not self._dropped:
                self._queue.put_nowait(point)
        except queue.Full:
            self._drop("does not keep up")

    def _work(self, open_writer: Callable[[], Writer]) -> None:
        try:
            writer = open_writer()
            while (point := self._queue.get()) is not None and not self._dropped:
                writer.write(*point)
            writer.close()
        # Training goes on whatever goes wrong in a service that only observes it.
        except Exception as e:
            self._drop(f"failed: {type(e).__name__}: {one_line(e, limit=300)}")

    def _drop(self, why: str) -> None:
        if not self._dropped:
            self._dropped = True
            text = f"warning: logging.writers: {self._name} {why}; the run goes on without it"
            print(text, file=sys.stderr, flush=True)


def open_writers(names: tuple[str, ...], run: RunIdentity) -> list[BackgroundWriter]:
    """Opens the named writers, each in its own thread."""
    return [BackgroundWriter(name, lambda cls=WRITERS[name][0]: cls(run)) for name in names]


def scalars(record: dict) -> dict[str, float]:
    """Flattens a record of metrics.jsonl, so that charts are grouped by task; only finite values are kept.

    ``<task>/loss``, ``<task>/<variant>/step_s``, ``<task>/<modality>_experts/unrouted_fraction``,
    ``temperature/<pair>``, ``run/learning_rate``.
    """
    task = record["task"]
    named = {f"{task}/{key}": record[key] for key in _TASK_KEYS if key in record}
    named |= {f"{task}/{record['variant']}/{key}": record[key] for key in _VARIANT_KEYS if key in record}
    named |= {f"{task}/losses/{term}": value for term, value in record.get("losses", {}).items()}
    named |= {f"temperature/{pair}": value for pair, value in record.get("temperatures", {}).items()}
    for modality, values in record.get("moe", {}).items():
        one = {key: value for key, value in values.items() if not isinstance(value, list)}
        named |= {f"{task}/{modality}_experts/{key}": value for key, value in one.items()}
    named |= {f"run/{key}": record[key] for key in _RUN_KEYS if key in record}
    return {name: float(value) for name, value in named.items() if math.isfinite(value)}


def evaluation_scalars(entries: list[dict]) -> dict[str, float]:
    """Flattens the entries of an evaluation: ``eval/<data set>/<task>/<metric>``."""
    named = {
        f"eval/{entry['dataset']}/{entry['task']}/{name}": value
        for entry in entries
        for name, value in entry["metrics"].items()
    }
    return {name: float(value) for name, value in named.items() if math.isfinite(value)}
