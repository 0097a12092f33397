"""The main job: prepare, train under Ray, evaluate, report."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cluster.capacity import check_accelerator
from pipeline.cluster.spec import Cluster
from pipeline.cluster.start import end_ray, start_ray
from pipeline.commands import typed_command
from pipeline.corpus import build_corpus
from pipeline.errors import one_line
from pipeline.plan import plan
from pipeline.provenance import provenance
from pipeline.ray_job import grace_warning
from pipeline.recipe import Recipe, specs
from pipeline.report.live import live_report, report_so_far
from pipeline.run_dir import check_run_dir, claim, lock_run_dir, set_damaged_aside
from pipeline.stopping import Stop
from pipeline.store.path import run_path
from pipeline.train.attempts import CommandAttempt, command_attempt
from pipeline.train.devices import check_backend
from pipeline.train.goodput import goodput
from pipeline.train.spec import RunSpec
from pipeline.waiting import waiting_for

if TYPE_CHECKING:
    from pipeline.evaluate.trained_model import TrainedModel

# Files that are written anew once training has ended.
_RESULTS = ("report.html", "eval.json", "showcase.json", "summary.json")


def pretrain(recipe: Recipe, run_dir: Path, *, started: float | None = None, stop: Stop | None = None) -> bool:
    """Runs a recipe to its end in ``run_dir``, from its last checkpoint if it has one.

    Returns False when it was interrupted and its state is saved. started: time.time() when the command began. stop:
    takes the signals.
    """
    clock, stop = _Clock(started), stop or Stop("stopped")
    stop.at_once(f"stopped before the first step, nothing to save; run it again with: {typed_command()}")
    cluster = specs.cluster_spec(recipe)
    stop.limit_s = cluster.stop_timeout_s
    check_accelerator(cluster)
    if cluster.num_workers == 0:
        check_backend(cluster.accelerator)
    changes = check_run_dir(recipe, run_dir)
    with contextlib.closing(lock_run_dir(run_dir)):
        spec = _prepare(recipe, run_dir, clock)
        num_steps = spec.mixture.num_steps
        done = spec.open_checkpoints().latest_step or 0
        if done >= num_steps and _is_finished(run_dir, done):
            print(f"{run_dir} is finished: {done} of {num_steps} steps. Report: {run_dir / 'report.html'}")
            return True
        if done:
            stop.at_once(f"stopped after step {done}, whose state is saved; go on with: {typed_command()}")
        _announce(spec, done, changes)
        finished = False
        try:
            finished = _run(recipe, spec, cluster, done=done, clock=clock, stop=stop)
        finally:
            if not finished:
                report_so_far(run_dir)
    return finished


def _run(recipe: Recipe, spec: RunSpec, cluster: Cluster, *, done: int, clock: _Clock, stop: Stop) -> bool:
    """One attempt. Returns False when it was interrupted and its state is saved. done: steps before it."""
    run_dir, num_steps = run_path(spec.run_dir), spec.mixture.num_steps
    with command_attempt(run_dir, began=clock.started, facts=provenance()) as attempt:
        if done < num_steps:
            # These files describe a shorter run.
            for name in _RESULTS:
                (run_dir / name).unlink(missing_ok=True)
            with live_report(run_dir):
                summary = _train(spec, cluster, clock, stop)
        else:
            summary = _old_summary(run_dir, done)
        if summary["steps"] < num_steps:
            attempt.outcome = "stopped"
            line = f"stopped after step {summary['steps']}, state saved; go on with: {typed_command()}"
            with contextlib.suppress(OSError):
                print(line, flush=True)
            return False
        stop.at_once(f"stopped after the last step, before evaluation and report; go on with: {typed_command()}")
        _finish(recipe, run_dir, summary, clock, attempt)
    return True


def _is_finished(run_dir: Path, done: int) -> bool:
    """Whether evaluation and report have ended too."""
    whole = all((run_dir / name).exists() for name in ("report.html", "eval.json"))
    return whole and _old_summary(run_dir, done).get("finished") is True


def _prepare(recipe: Recipe, run_dir: Path, clock: _Clock) -> RunSpec:
    with clock("corpus_s"), waiting_for("the demo corpus"):
        build_corpus(recipe)
    with clock("prepare_s"), waiting_for("manifests and the tokenizer"):
        set_damaged_aside(run_dir)
        spec = plan(recipe, run_dir)
        if recipe.checkpoint.keep_best is not None:
            from pipeline.evaluate.during import check_best

            check_best(recipe, spec)
        claim(run_dir, spec)
    return spec


def _announce(spec: RunSpec, done: int, changes: list[str]) -> None:
    """Prints the step at which the run goes on. changes: of the mixture."""
    for line in spec.open_checkpoints().faults():
        print(f"warning: {line}", file=sys.stderr, flush=True)
    if line := grace_warning():
        print(f"warning: {line}", file=sys.stderr, flush=True)
    if done:
        print(f"resuming {spec.run_dir} after step {done} of {spec.mixture.num_steps}", flush=True)
    for line in changes:
        print(f"the mixture changes: {line}", flush=True)


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
    """The summary of a run whose training was finished, but not its evaluation or report."""
    import json

    old = None
    # Absent or damaged: evaluation and report are made again.
    with contextlib.suppress(FileNotFoundError, ValueError):
        old = json.loads((run_dir / "summary.json").read_bytes())
    whole = isinstance(old, dict) and old.get("steps") == done and isinstance(old.get("time"), dict)
    return old if whole else {"steps": done, "time": {}}


def _finish(recipe: Recipe, run_dir: Path, summary: dict, clock: _Clock, attempt: CommandAttempt) -> None:
    """Evaluates, writes the quarantine list and the report, and adds all times to the summary."""
    from pipeline.evaluate.measure import evaluate_run
    from pipeline.evaluate.table import print_table
    from pipeline.evaluate.trained_model import TrainedModel
    from pipeline.files import write_json
    from pipeline.report.quarantine_table import write_table
    from pipeline.report.report import write_report

    write_json(run_dir / "summary.json", summary)
    write_table(run_dir)
    with clock("evaluation_s"), waiting_for("the evaluation"):
        model = TrainedModel(run_dir)
        # The stored recipe lacks the credentials of its URIs.
        model.use_recipe(recipe)
        results = evaluate_run(run_dir, model)
        _show(run_dir, model)
    write_json(run_dir / "eval.json", results)
    summary["time"] |= {name: round(value, 3) for name, value in clock.times.items()}
    summary["time"]["total_s"] = round(clock.elapsed_s, 3)
    attempt.seen()
    if life := goodput(run_dir):
        summary["goodput"] = life.values()
    write_json(run_dir / "summary.json", summary)
    report = write_report(run_dir)
    write_json(run_dir / "summary.json", summary | {"finished": True})
    print_table(results)
    _print_times(summary)
    print(f"report: {report}")


def _show(run_dir: Path, model: TrainedModel) -> None:
    """Writes the pictures of the report. A run that is trained and measured does not fail for want of them."""
    from pipeline.evaluate.showcase import write_showcase

    try:
        write_showcase(run_dir, model)
    except Exception as e:
        print(f"warning: the report has no pictures: {one_line(e)}", file=sys.stderr, flush=True)


def _print_times(summary: dict) -> None:
    names = {
        "corpus_s": "corpus",
        "prepare_s": "prepare",
        "start_s": "start Ray",
        "compile_wait_s": "wait for compiler",
        "data_wait_s": "wait for data",
        "steps_s": "steps",
        "save_s": "checkpoints",
        "evaluate_s": "evaluations between steps",
        "evaluation_s": "evaluation",
    }
    times = summary["time"]
    parts = [f"{label} {times[key]:.0f} s" for key, label in names.items() if key in times]
    print("where the time went: " + ", ".join(parts) + f"; total {times['total_s']:.0f} s")
    life = summary.get("goodput", {})
    if life.get("restarts"):
        print(
            f"over {life['restarts'] + 1} attempts, {life['up_s']:.0f} s: {life['share_of_up']['steps']:.0%} steps, "
            f"{life['share_of_up']['lost']:.0%} steps that were run again; between them {life['down_s']:.0f} s"
        )
    if "first_step_s" in times:
        print(
            f"first step after {times['first_step_s']:.0f} s; {summary['compile_count']} compiled graphs for "
            f"{summary['num_structures']} task structures, {times['compile_s']:.0f} s of compiling, for which steps "
            f"waited {times['compile_share']:.0%} of the training time"
        )


class _Clock:
    """Measures the seconds of named phases since the command began."""

    def __init__(self, started: float | None) -> None:
        now, self.times = time.time(), {}
        self.started = started or now
        self._began = time.perf_counter() - (now - self.started)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the command began, also if the system's clock was set since."""
        return time.perf_counter() - self._began

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.times[name] = self.times.get(name, 0.0) + time.perf_counter() - begin
