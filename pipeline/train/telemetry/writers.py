"""Where the numbers of a run go besides its own metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

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

from pipeline.files import write_bytes


class Writer(Protocol):
    """Takes the scalars of one step after the other."""

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Place:
    """The run that a writer writes of.

    start_step: steps done before; what was written of later ones stands no more. logged_step: the last step of which
    an earlier process may have written; where it did, the point that is there stays.
    """

    run_dir: Path
    project: str
    start_step: int
    logged_step: int

    def kept_id(self, writer: str, make: Callable[[], str]) -> str:
        """The name under which a service knows this run, made once."""
        path = self.run_dir / f"{writer}.id"
        if not path.exists():
            write_bytes(path, make().encode())
        return path.read_text()


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, place: Place):
        from tensorboardX import SummaryWriter

        # TensorBoard hides what earlier files have of these steps.
        purge = place.start_step + 1
        self._writer = SummaryWriter(str(place.run_dir / "tensorboard"), purge_step=purge, flush_secs=2)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, whose own settings (WANDB_MODE, WANDB_API_KEY, ...) hold."""

    def __init__(self, place: Place):
        import wandb

        config = place.run_dir / "config.yaml"
        self._logged_step = place.logged_step
        self._run = wandb.init(
            project=place.project,
            id=place.kept_id("wandb", lambda: uuid.uuid4().hex[:12]),
            resume="allow",
            name=place.run_dir.name,
            dir=str(place.run_dir),
            config=yaml.safe_load(config.read_text()) if config.exists() else None,
            # The run's output is its own.
            settings=wandb.Settings(console="off", quiet=True),
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        if step > self._logged_step:
            self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of the MLflow server or store that MLFLOW_TRACKING_URI names."""

    def __init__(self, place: Place):
        from mlflow import MlflowClient

        self._client, self._logged_step = MlflowClient(), place.logged_step
        self._run_id = place.kept_id("mlflow", lambda: self._new_run(place))
        self._client.update_run(self._run_id, status="RUNNING")

    def _new_run(self, place: Place) -> str:
        found = self._client.get_experiment_by_name(place.project)
        experiment = found.experiment_id if found else self._client.create_experiment(place.project)
        return self._client.create_run(experiment, run_name=place.run_dir.name).info.run_id

    def write(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        if step > self._logged_step:
            now_ms = int(time.time() * 1000)
            metrics = [Metric(name, value, now_ms, step) for name, value in values.items()]
            self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


# Name in a recipe → (class, the module it needs, what installs it).
WRITERS = {
    "tensorboard": (TensorBoard, "tensorboardX", "tensorboardX"),
    "wandb": (WandB, "wandb", "'imp[wandb]'"),
    "mlflow": (MLflow, "mlflow", "'imp[mlflow]'"),
}


def missing(names: tuple[str, ...]) -> dict[str, str]:
    """Writers that cannot be imported here → what to install."""
    return {name: f"pip install {WRITERS[name][2]}" for name in names if not _importable(name)}


def default_writers() -> tuple[str, ...]:
    """TensorBoard where it is installed."""
    return ("tensorboard",) if _importable("tensorboard") else ()


def _importable(name: str) -> bool:
    return importlib.util.find_spec(WRITERS[name][1]) is not None


# Steps that a writer may be behind before it is given up.
_MOST_WAITING = 10_000
_CLOSE_S = 60.0


class Guarded:
    """A writer in a thread of its own: one that fails, hangs or is slow costs its points, never a step.

    When it fails, one line says so and it is written to no more.
    """

    def __init__(self, name: str, open_writer: Callable[[], Writer]):
        self._name, self._dropped = name, False
        self._queue: queue.Queue = queue.Queue(maxsize=_MOST_WAITING)
        self._thread = threading.Thread(target=self._work, args=(open_writer,), name=f"writer-{name}", daemon=True)
        self._thread.start()

    def write(self, step: int, values: dict[str, float]) -> None:
        self._put((step, values))

    def close(self) -> None:
        """Writes what is waiting."""
        self._put(None)
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            self._drop("did not end in time")

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
        # Whatever goes wrong in a service that only looks on, training goes on.
        except Exception as e:
            self._drop(f"failed: {type(e).__name__}: {' '.join(str(e).split())[:300]}")

    def _drop(self, why: str) -> None:
        if not self._dropped:
            self._dropped = True
            text = f"warning: logging.writers: {self._name} {why}; the run goes on without it"
            print(text, file=sys.stderr, flush=True)


def open_writers(names: tuple[str, ...], place: Place) -> list[Guarded]:
    """The named writers, each behind its guard."""
    return [Guarded(name, lambda cls=WRITERS[name][0]: cls(place)) for name in names]


def scalars(record: dict) -> dict[str, float]:
    """A record of metrics.jsonl as flat names, so that a task's charts stand together; only what is finite.

    ``<task>/loss``, ``<task>/<variant>/step_s``, ``<task>/<modality>_experts/unrouted_fraction``,
    ``temperature/<pair>``, ``run/learning_rate``.
    """
    task = record["task"]
    named = {f"{task}/{key}": record[key] for key in _OF_TASK if key in record}
    named |= {f"{task}/{record['variant']}/{key}": record[key] for key in _OF_VARIANT if key in record}
    named |= {f"{task}/losses/{term}": value for term, value in record.get("losses", {}).items()}
    named |= {f"temperature/{pair}": value for pair, value in record.get("temperatures", {}).items()}
    for modality, values in record.get("moe", {}).items():
        one = {key: value for key, value in values.items() if not isinstance(value, list)}
        named |= {f"{task}/{modality}_experts/{key}": value for key, value in one.items()}
    named |= {f"run/{key}": record[key] for key in _OF_RUN if key in record}
    return {name: float(value) for name, value in named.items() if math.isfinite(value)}


_OF_TASK = ("loss", "grad_norm", "data_wait_s", "task_steps", "expected_steps")
_OF_VARIANT = ("loss", "step_s", "examples_per_s", "tokens_per_s", "mfu")
_OF_RUN = ("learning_rate", "rss_bytes", "device_bytes", "device_peak_bytes")
