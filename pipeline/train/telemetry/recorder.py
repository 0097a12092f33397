"""What a run writes while it runs, step by step; all of it but the checkpoints."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
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
from pipeline.train.telemetry.writers import Place, open_writers, scalars


class Recorder:
    """Takes the record of each step to whatever shows or keeps it: files, writers, alarms, progress, profiler.

    Rank 0 keeps all of it, other ranks their samples alone. flops: (task, variant) → training FLOPs of a step on all
    devices. shared_encoder: all modalities go through the same experts. forecast: of the steps to come.
    first_step_at: time.time() when the first step's metrics came, None before.
    """

    def __init__(
        self,
        spec: LoggingSpec,
        *,
        run_dir: Path,
        rank: int,
        start_step: int,
        num_steps: int,
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
                self._samples = StepLog(run_dir / name, keep_steps=start_step)
                if rank == 0:
                    _cut_back_ranks_that_left(run_dir, keep_steps=start_step)
            if rank == 0:
                self._rank_0 = _Rank0(
                    spec,
                    run_dir=run_dir,
                    start_step=start_step,
                    num_steps=num_steps,
                    speed=Speed(flops, peak_flops=spec.peak_flops),
                    alarms=Alarms(shared_encoder=shared_encoder, feed_advice=spec.feed_advice),
                    forecast=forecast,
                )

    @contextlib.contextmanager
    def _writing(self):
        """A disk that is full or gone ends the run, and is tried no more."""
        try:
            yield
        except OSError as e:
            self._failed = True
            raise DataError(
                f"the run directory cannot be written: {one_line(e)}; free some space or mend the storage, and run the "
                "same command again"
            ) from e

    def record(self, record: dict) -> None:
        """record: as the loop makes it; ids: this process's samples. alarms, where it has some, come first."""
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

    def sync(self) -> None:
        """Order contract: what a checkpoint covers is on disk before the checkpoint is."""
        if self._failed:
            return
        with self._writing():
            for part in (self._samples, self._rank_0):
                if part:
                    part.sync()

    def close(self) -> None:
        # A full disk has its message by now: closing must not hide it.
        for part in (self._samples, self._rank_0):
            if part:
                with contextlib.suppress(OSError):
                    part.close()


def _cut_back_ranks_that_left(run_dir: Path, *, keep_steps: int) -> None:
    """With fewer processes than before nobody else would: what they saw after the checkpoint others see again."""
    for path in run_dir.glob("samples-rank-*.jsonl"):
        if int(path.stem.rpartition("-")[2]) >= jax.process_count():
            cut_back(path, keep_steps=keep_steps)


class _Rank0:
    def __init__(
        self,
        spec: LoggingSpec,
        *,
        run_dir: Path,
        start_step: int,
        num_steps: int,
        speed: Speed,
        alarms: Alarms,
        forecast: Forecast | None,
    ):
        self._began, self._experts_file = time.perf_counter(), run_dir / "experts.json"
        self._log_every, self._num_steps, self._unlogged_alarms = spec.log_every, num_steps, []
        self._speed, self._alarms = speed, alarms
        self._loads = ExpertLoads.read(self._experts_file) if start_step else ExpertLoads()
        self._metrics = StepLog(run_dir / "metrics.jsonl", keep_steps=start_step)
        place = Place(run_dir, spec.project, start_step, logged_step=self._metrics.last_step)
        self._writers = open_writers(spec.writers, place)
        self._profiler = None
        if spec.profile_steps:
            self._profiler = ProfilerWindow(
                spec.profile_steps, folder=run_dir / "profile", start_step=start_step, every=1
            )
        self._progress = Progress(
            mode=spec.progress,
            num_steps=num_steps,
            every_s=spec.progress_every_s,
            start_step=start_step,
            forecast=forecast,
        )

    def record(self, record: dict) -> None:
        moe = record.get("moe", {})
        self._loads.add(record["task"], record["variant"], moe)
        alarms = record.pop("alarms", []) + self._alarms.check(record, self._loads)
        self._unlogged_alarms += alarms
        _say([f"alarm at step {record['step']}: {text}" for text in alarms])
        if self._profiler:
            self._profiler.reached(record["step"])
        if record["step"] % self._log_every and record["step"] != self._num_steps:
            return
        alarms, self._unlogged_alarms = self._unlogged_alarms, []
        record |= self._speed.of(record) | devices.memory() | {"moe": layer_means(moe)}
        record["wall_s"] = round(time.perf_counter() - self._began, 3)
        if alarms:
            record["alarms"] = alarms
        self._metrics.write(record)
        for writer in self._writers:
            writer.write(record["step"], scalars(record))
        # The terminal may be gone, and the run goes on.
        with contextlib.suppress(OSError, ValueError):
            self._progress.update(record)

    def sync(self) -> None:
        self._metrics.sync()
        self._loads.write(self._experts_file)

    def close(self) -> None:
        for part in filter(None, (self._progress, self._metrics, self._profiler, *self._writers)):
            with contextlib.suppress(OSError):
                part.close()
        self._loads.write(self._experts_file)


def _say(lines: list[str]) -> None:
    with contextlib.suppress(OSError, ValueError):
        for line in lines:
            print(line, file=sys.stderr, flush=True)


class Speed:
    """Rates of a step over all of its time, the waits too.

    flops: (task, variant) → FLOPs of a step. peak_flops: of one device; None: by its kind.
    """

    def __init__(self, flops: Mapping[tuple[str, str], int], *, peak_flops: float | None):
        peak = peak_flops or devices.peak_flops(jax.devices()[0].device_kind)
        self._flops, self._peak = flops, peak and peak * jax.device_count()

    def of(self, record: dict) -> dict[str, float]:
        """examples_per_s, tokens_per_s; mfu: FLOPs over those that all devices could do, where that is known."""
        busy_s = record["step_s"] + record["data_wait_s"] + record["compile_wait_s"]
        if not busy_s > 0:
            return {}
        found = {f"{name}_per_s": round(record[name] / busy_s, 3) for name in ("examples", "tokens")}
        if self._peak:
            flops = self._flops[record["task"], record["variant"]]
            found["mfu"] = float(f"{flops / busy_s / self._peak:.4g}")
        return found
