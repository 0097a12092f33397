"""The main job: prepare, train under Ray, evaluate, report."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from pathlib import Path

from pipeline.cluster.spec import Cluster
from pipeline.cluster.start import check_accelerator, end_ray, start_ray
from pipeline.credentials import redacted
from pipeline.prepare import build_corpus, check_run_dir, lock_run_dir, prepare
from pipeline.recipe import Recipe, specs
from pipeline.stopping import Stop
from pipeline.train.checkpoint import Checkpoints
from pipeline.train.devices import check_backend
from pipeline.train.spec import RunSpec
from pipeline.waiting import waiting_for

# Written once training has ended, the page last.
_OF_THE_END = ("report.html", "eval.json", "summary.json")
# Bytes of a checkpoint that take some seconds to read.
_SLOW_BYTES = 4_000_000_000


def pretrain(recipe: Recipe, run_dir: Path, *, started: float | None = None, stop: Stop | None = None) -> bool:
    """Runs a recipe to its end in ``run_dir``, from its last checkpoint where there is one.

    Returns False when it was interrupted and its state is saved. started: time.time() when the command began. stop:
    what signals have asked for.
    """
    clock, stop = _Clock(started), stop or Stop("stopped")
    stop.at_once(f"stopped before the first step, nothing to save; run it again with: {_command()}")
    cluster = specs.cluster_spec(recipe)
    check_accelerator(cluster)
    if cluster.num_workers == 0:
        check_backend(cluster.accelerator)
    changes = check_run_dir(recipe, run_dir)
    with contextlib.closing(lock_run_dir(run_dir)):
        with clock("corpus_s"), waiting_for("the demo corpus"):
            build_corpus(recipe)
        with clock("prepare_s"), waiting_for("manifests and the tokenizer"):
            set_damaged_aside(run_dir)
            spec = prepare(recipe, run_dir)
            done = spec.checkpoints().latest_step or 0
        if done >= spec.num_steps and (run_dir / "report.html").exists():
            print(f"{run_dir} is finished: {done} of {spec.num_steps} steps. Report: {run_dir / 'report.html'}")
            return True
        for line in spec.checkpoints().faults():
            print(f"warning: {line}", file=sys.stderr, flush=True)
        if done:
            stop.at_once(f"stopped after step {done}, whose state is saved; go on with: {_command()}")
            print(f"resuming {run_dir} after step {done} of {spec.num_steps}", flush=True)
        for line in changes:
            print(f"the mixture changes: {line}", flush=True)
        if done < spec.num_steps:
            # Those of an earlier end are of fewer steps.
            for name in _OF_THE_END:
                (run_dir / name).unlink(missing_ok=True)
        summary = _train(spec, cluster, clock, stop) if done < spec.num_steps else _old_summary(run_dir, done)
        if summary["steps"] < spec.num_steps:
            with contextlib.suppress(OSError):
                print(f"stopped after step {summary['steps']}, state saved; go on with: {_command()}", flush=True)
            return False
        stop.at_once(f"stopped after the last step, before evaluation and report; go on with: {_command()}")
        _finish(recipe, run_dir, summary, clock)
    return True


def set_damaged_aside(run_dir: Path) -> None:
    """Reads the newest checkpoint before the run goes on from it; the one before is the way back."""
    checkpoints = Checkpoints(run_dir)
    if checkpoints.latest_bytes > _SLOW_BYTES:
        size = checkpoints.latest_bytes / 1e9
        print(f"comparing checkpoint {checkpoints.latest_step} ({size:.0f} GB) with its digests", flush=True)
    _, lines = checkpoints.choose(set_aside=True)
    for line in lines:
        print(f"warning: {line}", file=sys.stderr, flush=True)


def _train(spec: RunSpec, cluster: Cluster, clock: _Clock, stop: Stop) -> dict:
    from pipeline.cluster import trainer

    trainer.check_world(spec, cluster)
    try:
        with clock("start_s"):
            start_ray(cluster)
        # Ray takes SIGTERM for itself.
        stop.install()
        summary = trainer.fit(spec, cluster, stop=stop)
    finally:
        with waiting_for("Ray to end"):
            end_ray()
    if summary["first_step_at"]:
        clock.times["first_step_s"] = summary["first_step_at"] - clock.started
    return summary


def _old_summary(run_dir: Path, done: int) -> dict:
    """Training had ended, what comes after it had not."""
    import json

    path = run_dir / "summary.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    return old if old.get("steps") == done else {"steps": done, "time": {}}


def _finish(recipe: Recipe, run_dir: Path, summary: dict, clock: _Clock) -> None:
    """Evaluation, quarantine list, report; the summary says where the time went."""
    from pipeline.evaluate.measure import evaluate_run, print_table
    from pipeline.evaluate.trained_model import TrainedModel
    from pipeline.files import write_json
    from pipeline.report.quarantine_table import write_table
    from pipeline.report.report import write_report

    write_json(run_dir / "summary.json", summary)
    write_table(run_dir)
    with clock("evaluation_s"), waiting_for("the evaluation"):
        model = TrainedModel(run_dir)
        # The stored recipe is without the credentials of its URIs.
        model.use_recipe(recipe)
        results = evaluate_run(run_dir, model)
    write_json(run_dir / "eval.json", results)
    summary["time"] |= {name: round(value, 3) for name, value in clock.times.items()}
    summary["time"]["total_s"] = round(time.time() - clock.started, 3)
    write_json(run_dir / "summary.json", summary)
    report = write_report(run_dir)
    print_table(results)
    _print_times(summary)
    print(f"report: {report}")


def _print_times(summary: dict) -> None:
    names = {
        "corpus_s": "corpus",
        "prepare_s": "prepare",
        "start_s": "start Ray",
        "compile_wait_s": "wait for compiler",
        "data_wait_s": "wait for data",
        "steps_s": "steps",
        "save_s": "checkpoints",
        "evaluation_s": "evaluation",
    }
    times = summary["time"]
    parts = [f"{label} {times[key]:.0f} s" for key, label in names.items() if key in times]
    print("where the time went: " + ", ".join(parts) + f"; total {times['total_s']:.0f} s")
    if "first_step_s" in times:
        print(
            f"first step after {times['first_step_s']:.0f} s; {summary['compile_count']} compiled graphs for "
            f"{summary['num_structures']} task structures, {times['compile_s']:.0f} s of compiling, for which steps "
            f"waited {times['compile_share']:.0%} of the training time"
        )


def _command() -> str:
    # Logs keep it: without the credentials of URIs that --set was given.
    return redacted(shlex.join(["python", *sys.argv]))


class _Clock:
    """Seconds of named phases since the command began."""

    def __init__(self, started: float | None):
        self.started, self.times = started or time.time(), {}

    @contextlib.contextmanager
    def __call__(self, name: str):
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.times[name] = self.times.get(name, 0.0) + time.perf_counter() - begin
