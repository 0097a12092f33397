"""Runs a recipe without Ray: the queues are filled in this process. Used by tests that kill it.

python bare_run.py RECIPE RUN_DIR
"""

import json
import sys
from pathlib import Path

from pipeline import recipe as recipes
from pipeline.data.batches import BatchMaker, SampleMaker
from pipeline.data.plan import TaskPlan
from pipeline.data.shards import open_source
from pipeline.data.tokenizer import Tokenizer
from pipeline.plan import plan
from pipeline.run_dir import check_run_dir, claim, set_damaged_aside
from pipeline.train.quarantine import known_bad
from pipeline.train.run import train
from pipeline.train.step_gate import StepGate


class DirectQueue:
    """Makes each row when it is asked for, through the same code as a stream's process."""

    def __init__(self, spec, task, *, start, stop):
        data_set = spec.data.data_sets[task.data_set]
        samples = SampleMaker(
            task,
            data_set,
            tokenizer=Tokenizer(spec.data.tokenizer) if spec.data.tokenizer else None,
            tokens=spec.data.tokens,
        )
        plan = TaskPlan(task, seed=spec.mixture.seed, num_rows=spec.data.num_rows[task.data_set], num_batches=stop)
        bad = known_bad(Path(spec.run_dir)).get(task.name, {})
        source = open_source(data_set, modalities=task.media)
        self._maker, self._next = BatchMaker(plan, samples, source, known_bad=bad), start

    def next(self):
        row = self._maker.row(self._next, rank=0, world_size=1)
        self._next += 1
        return row

    def awaits(self):
        return "decoding"

    def close(self):
        pass

    def join(self, timeout_s):
        return True


def run(recipe, run_dir: Path, should_stop=lambda: False) -> dict:
    check_run_dir(recipe, run_dir)
    set_damaged_aside(run_dir)
    spec = plan(recipe, run_dir)
    claim(run_dir, spec)

    def make_queues(schedule):
        begins = schedule.batches_before(schedule.start)
        return {
            n: DirectQueue(spec, t, start=begins[n], stop=schedule.batches_at_most(n))
            for n, t in spec.data.tasks.items()
        }

    spec.open_checkpoints().remove_leftovers()
    return train(spec, make_queues, gate=StepGate(should_stop))


if __name__ == "__main__":
    summary = run(recipes.load(Path(sys.argv[1])), Path(sys.argv[2]))
    (Path(sys.argv[2]) / "bare_summary.jsonl").write_text(json.dumps(summary))
