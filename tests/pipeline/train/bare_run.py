"""Runs a recipe without Ray: the queues are filled in this process. For tests that kill it, and for benchmarks.

python bare_run.py RECIPE RUN_DIR
"""

import json
import sys
from pathlib import Path

from pipeline import recipe as recipes
from pipeline.data.direct_queue import direct_queues
from pipeline.plan import plan
from pipeline.run_dir import check_run_dir, claim, set_damaged_aside
from pipeline.store.path import run_path
from pipeline.train.quarantine import known_bad
from pipeline.train.run import train
from pipeline.train.step_gate import StepGate


def run(recipe, run_dir: Path, should_stop=lambda: False) -> dict:
    check_run_dir(recipe, run_dir)
    set_damaged_aside(run_dir)
    spec = plan(recipe, run_dir)
    claim(run_dir, spec)

    def make_queues(schedule):
        begins = schedule.batches_before(schedule.start)
        batches = {name: (begins[name], schedule.batches_at_most(name)) for name in spec.data.tasks}
        return direct_queues(spec.data, batches, seed=spec.mixture.seed, known_bad=known_bad(run_dir))

    spec.open_checkpoints().remove_leftovers()
    return train(spec, make_queues, gate=StepGate(should_stop))


if __name__ == "__main__":
    where = run_path(sys.argv[2])
    summary = run(recipes.load(Path(sys.argv[1])), where)
    (where / "bare_summary.json").write_text(json.dumps(summary))
