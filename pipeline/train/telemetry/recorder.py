"""Writes what a run leaves behind step by step: everything but the checkpoints."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

from pipeline.errors import DataError, one_line
from pipeline.train import devices
from pipeline.train.forecast import Forecast
from pipeline.train.telemetry.alarms import Alarms
from pipeline.train.telemetry.expert_loads import ExpertLoads, layer_means
from pipeline.train.telemetry.profiler import ProfilerWindow
from pipeline.train.telemetry.progress import Progress
from pipeline.train.telemetry.spec import LoggingSpec
from pipeline.train.telemetry.step_log import StepLog, cut_back
from pipeline.train.telemetry.throughput import Throughput
from pipeline.train.telemetry.writers import RunIdentity, evaluation_scalars, open_writers, scalars

# File of the evaluations between steps, one line each.
CURVE = "eval_curve.jsonl"
# Keys of an evaluation's entry that are kept in it.
_POINT = ("dataset", "task", "input", "metrics", "intervals", "chance", "num_examples")


class Recorder:
    """Passes the record of each step to files, writers, alarms, progress and profiler.

    Rank 0 writes all of it, other ranks only their samples. flops: (task, variant) → training FLOPs of a step on all
    devices. steps: those still to run. shared_encoder: all modalities use the same experts. forecast: time of these
    steps. first_step_at: time.time() when the first step was recorded, None before.
    """

    def __init__(
        self,
        spec: LoggingSpec,
        *,
        run_dir: Path,
        rank: int,
        steps: range,
        flops: Mapping[tuple[str, str], int],
        shared_encoder: bool,
        forecast: Forecast | None = None,
    ):
        self.first_step_at: float | None = None
        self._samples = self._rank_0 = None
        self._failed = False
        with self._writing():
            if spec.log_samples:
                name = "samples.jsonl" if rank == 0 else f"samples-rank-{rank}.jsonl"
                self._samples = StepLog(run_dir / name, keep_steps=steps.start)
                if rank == 0:
                    _cut_back_departed_ranks(run_dir, keep_steps=steps.start)
            if rank == 0:
                self._rank_0 = _Rank0(
                    spec,
                    run_dir=run_dir,
                    steps=steps,
                    throughput=Throughput(flops, peak_flops=spec.peak_flops),
                    alarms=Alarms(shared_encoder=shared_encoder, feed_advice=spec.feed_advice),
                    forecast=forecast,
                )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A disk that is full or gone ends the run; nothing more is written to it."""
        try:
            yield
        except OSError as e:
            self._failed = True
            raise DataError(
                f"the run directory cannot be written: {one_line(e)}; free some space or mend the storage, and run the "
                "same command again"
            ) from e

    def record(self, record: dict) -> None:
        """Takes a record from the loop. ids: this process's samples. alarms: if present, they precede those found here.

        Raises DataError if the run directory cannot be written.
        """
        if self.first_step_at is None:
            self.first_step_at = time.time()
        if self._failed:
            return
        record = dict(record)
        ids = record.pop("ids")
        with self._writing():
            if self._samples:
                self._samples.write({"step": record["step"], "task": record["task"], "ids": ids})
            if self._rank_0:
                self._rank_0.record(record)

    def evaluated(self, step: int, entries: list[dict]) -> None:
        """Takes the entries of an evaluation after ``step`` updates. Raises DataError as ``record`` does."""
        if self._rank_0 and not self._failed:
            with self._writing():
                self._rank_0.evaluated(step, entries)

    def sync(self) -> None:
        """Flushes all files to disk. Order contract: called before the checkpoint that covers these steps is stored."""
        if self._failed:
            return
        with self._writing():
            for part in (self._samples, self._rank_0):
                if part:
                    part.sync()

    def close(self) -> None:
        """Closes all files."""
        # A full disk has already been reported; an error while closing must not mask it.
        for part in (self._samples, self._rank_0):
            if part:
                with contextlib.suppress(OSError):
                    part.close()


def _cut_back_departed_ranks(run_dir: Path, *, keep_steps: int) -> None:
    """Cuts back the logs of ranks that no longer exist: after a shrink the remaining ranks see those samples again."""
    for path in run_dir.glob("samples-rank-*.jsonl"):
        if int(path.stem.rpartition("-")[2]) >= jax.process_count():
            cut_back(path, keep_steps=keep_steps)


class _Rank0:
    """Everything that rank 0 alone writes and shows."""

    def __init__(
        self,
        spec: LoggingSpec,
        *,
        run_dir: Path,
        steps: range,
        throughput: Throughput,
        alarms: Alarms,
        forecast: Forecast | None,
    ):
        self._began = time.perf_counter()
        self._log_every = spec.log_every
        self._last_step = steps.stop
        self._throughput = throughput
        self._alarms = alarms
        self._unlogged_alarms: list[str] = []
        self._experts_file = run_dir / "experts.json"
        self._loads = ExpertLoads.read(self._experts_file) if steps.start else ExpertLoads()
        self._metrics = StepLog(run_dir / "metrics.jsonl", keep_steps=steps.start)
        # Also of a run that is no longer evaluated: its later points are of steps that were taken back.
        cut_back(run_dir / CURVE, keep_steps=steps.start)
        self._curve = StepLog(run_dir / CURVE, keep_steps=steps.start) if spec.evaluate_every else None
        run = RunIdentity(run_dir, spec.project, steps.start, logged_step=self._metrics.last_step)
        self._writers = open_writers(spec.writers, run)
        self._profiler = None
        if spec.profile_steps:
            self._profiler = ProfilerWindow(spec.profile_steps, run_dir=run_dir, start_step=steps.start)
        self._progress = Progress(
            mode=spec.progress,
            steps=steps,
            every_s=spec.progress_every_s,
            forecast=forecast,
        )

    def record(self, record: dict) -> None:
        self._loads.add(record["task"], record["variant"], record.get("moe", {}))
        self._raise_alarms(record)
        if self._profiler:
            self._profiler.reached(record["step"])
        if record["step"] % self._log_every == 0 or record["step"] == self._last_step:
            self._log(record)

    def _raise_alarms(self, record: dict) -> None:
        alarms = record.pop("alarms", []) + self._alarms.check(record, self._loads)
        self._unlogged_alarms += alarms
        _print([f"alarm at step {record['step']}: {text}" for text in alarms])

    def _log(self, record: dict) -> None:
        record |= self._throughput.rates(record) | devices.memory() | {"moe": layer_means(record.get("moe", {}))}
        record["wall_s"] = round(time.perf_counter() - self._began, 3)
        if self._unlogged_alarms:
            record["alarms"] = self._unlogged_alarms
            self._unlogged_alarms = []
        self._metrics.write(record)
        for writer in self._writers:
            writer.write(record["step"], scalars(record))
        # The run outlives its terminal.
        with contextlib.suppress(OSError, ValueError):
            self._progress.update(record)

    def evaluated(self, step: int, entries: list[dict]) -> None:
        wall_s = round(time.perf_counter() - self._began, 3)
        assert self._curve is not None
        self._curve.write({"step": step, "wall_s": wall_s, "entries": [_point(entry) for entry in entries]})
        for writer in self._writers:
            writer.write(step, evaluation_scalars(entries))
        with contextlib.suppress(OSError, ValueError):
            self._progress.evaluated(step, entries)

    def sync(self) -> None:
        self._metrics.sync()
        if self._curve:
            self._curve.sync()
        self._loads.write(self._experts_file)

    def close(self) -> None:
        for part in filter(None, (self._progress, self._metrics, self._curve, self._profiler, *self._writers)):
            with contextlib.suppress(OSError):
                part.close()
        self._loads.write(self._experts_file)


def _point(entry: dict) -> dict:
    """The part of an entry that changes from evaluation to evaluation, and what tells it from others."""
    return {name: entry[name] for name in _POINT if name in entry}


def _print(lines: list[str]) -> None:
    with contextlib.suppress(OSError, ValueError):
        for line in lines:
            print(line, file=sys.stderr, flush=True)
