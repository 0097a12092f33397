"""Runs a recipe without Ray: the queues are filled in this process. For tests that kill it, and for benchmarks.

python bare_run.py RECIPE RUN_DIR [--hold STEP]
"""

import argparse
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from pipeline import recipe as recipes
from pipeline.cli.job import run_job
from pipeline.data.direct_queue import direct_queues
from pipeline.errors import EXIT_DONE, EXIT_RUN_AGAIN
from pipeline.plan import plan
from pipeline.run_dir import check_run_dir, claim, set_damaged_aside
from pipeline.stopping import Stop
from pipeline.store.path import run_path
from pipeline.train.quarantine import known_bad
from pipeline.train.run import train
from pipeline.train.step_gate import NextAction, StepGate


class _Steps(StepGate):
    """Lets a process take a number of steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._left = steps

    def next_action(self, step: int, *, wait: bool = True) -> NextAction | None:
        if not self._left:
            return NextAction.STOP
        self._left -= 1
        return super().next_action(step, wait=wait)


class _Held(StepGate):
    """Lets a process go no further than an update of the run: it waits there to be killed."""

    def __init__(self, should_stop: Callable[[], bool], update: int | None) -> None:
        super().__init__(should_stop)
        self._update = update

    def next_action(self, step: int, *, wait: bool = True) -> NextAction | None:
        if step == self._update:
            threading.Event().wait()
        return super().next_action(step, wait=wait)


def run(recipe, run_dir: Path, should_stop=lambda: False, *, steps: int | None = None, hold: int | None = None) -> dict:
    """The summary. steps: that this process takes at most. hold: the update after which it waits for ever."""
    check_run_dir(recipe, run_dir)
    set_damaged_aside(run_dir)
    spec = plan(recipe, run_dir)
    claim(run_dir, spec)

    def make_queues(schedule):
        begins = schedule.batches_before(schedule.start)
        batches = {name: (begins[name], schedule.batches_at_most(name)) for name in spec.data.tasks}
        return direct_queues(spec.data, batches, seed=spec.mixture.seed, known_bad=known_bad(run_dir))

    spec.open_checkpoints().remove_leftovers()
    return train(spec, make_queues, gate=_Held(should_stop, hold) if steps is None else _Steps(steps))


def job(arguments: argparse.Namespace, stop: Stop) -> int:
    """The run as a command that obeys signals as the product's own does."""
    asked = []

    def should_stop() -> bool:
        # From the second step on there is a state to save.
        asked.append(None)
        if len(asked) > 1:
            stop.defer()
        return stop.is_set()

    summary = run(recipes.load(arguments.recipe), arguments.run_dir, should_stop, hold=arguments.hold)
    stop.at_once("stopped after the last step")
    (arguments.run_dir / "bare_summary.json").write_text(json.dumps(summary))
    return EXIT_DONE if summary["steps"] == summary["num_steps"] else EXIT_RUN_AGAIN


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", type=Path)
    parser.add_argument("run_dir", type=run_path)
    parser.add_argument("--hold", type=int)
    sys.exit(run_job(job, parser.parse_args()))
