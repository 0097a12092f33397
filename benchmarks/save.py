"""The cost of saving to a run. JSON on standard output.

    python -m benchmarks.save [--quick]

The training loop over one structure, with a checkpoint every few steps and without any, in turns. blocking: the
time that a save blocks the loop over that of a step (aim on CPUs: at most 1). while saving: the median step
during which a save writes in the background over the median of all steps of the runs without (aim on GPUs: at most
1.1). cost of a save: the extra time of the runs with saves, for each save, in steps. share: that cost over the time
between two saves of the demo's recipe (aim on CPUs: at most 0.03).
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path

import jax
import yaml

from benchmarks import timing
from benchmarks.memory_feed import Batches, make_loop
from model.config import OptimizerConfig, from_variant
from model.imp import Imp
from model.step import compile_step, init_state
from model.structure import InputShape, Structure
from pipeline.train.checkpoint import Checkpoints

SIZES = {
    "quick": {"variant": "imp-tiny-moe", "batch": 4, "tokens": 4, "rounds": 1, "every": 4, "saves": 2},
    "cpu": {"variant": "imp-tiny-moe", "batch": 64, "tokens": 16, "rounds": 5, "every": 40, "saves": 3},
    "gpu": {"variant": "imp-l-moe", "batch": 64, "tokens": 256, "rounds": 3, "every": 40, "saves": 3},
}
OPTIMIZER = OptimizerConfig(peak_learning_rate=1e-4, warmup_steps=10, num_steps=1_000_000)
DEMO = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"


class Run:
    """One run of the loop. seconds: until its last save is whole. step_s: (seconds, whether a save ran)."""

    def __init__(self, state, batch, step, *, num_steps: int, every: int | None, folder: Path):
        self.step_s, self._last = [], time.perf_counter()
        self._checkpoints, self._busy = Checkpoints(folder), False
        began = time.perf_counter()
        self.loop = make_loop(
            state,
            [batch] * num_steps,
            {batch.plan.structure: step},
            record=self._record,
            save=self._save if every else None,
            checkpoint_every=every,
        )
        self.loop.run()
        self._checkpoints.wait()
        self.seconds = time.perf_counter() - began
        shutil.rmtree(folder, ignore_errors=True)

    def _record(self, values: dict) -> None:
        self.step_s.append((values["step_s"], self._busy or self._checkpoints.saving))
        self._busy = self._checkpoints.saving

    def _save(self, step: int, state: dict) -> None:
        self._checkpoints.save(step, state=state, data={})
        self._busy = True


def main() -> None:
    args = timing.arguments(__doc__)
    sizes = timing.pick(SIZES, quick=args.quick)
    inputs = (InputShape("vision", sizes["tokens"], 768, 3), InputShape("text", 16, 0, 1))
    structure = Structure((("nce", 1.0),), sizes["batch"], inputs)
    imp = Imp.for_structures(from_variant(sizes["variant"], dtype=sizes["dtype"]), [structure])
    step, state = compile_step(imp, structure, OPTIMIZER), init_state(imp.init(0))
    batch = Batches([structure])[structure]
    num_steps = sizes["every"] * sizes["saves"]
    folder = Path(tempfile.mkdtemp())
    with_saves, without = [], []
    for number in range(sizes["rounds"]):
        for every, into in ((None, without), (sizes["every"], with_saves)):
            into.append(Run(state, batch, step, num_steps=num_steps, every=every, folder=folder / str(number)))
        timing.say(
            f"round {number + 1}: {without[-1].seconds:.2f} s without saves, {with_saves[-1].seconds:.2f} s with"
        )
    shutil.rmtree(folder)
    normal_s = statistics.median(s for run in without for s, _ in run.step_s)
    during = [s for run in with_saves for s, saving in run.step_s if saving]
    blocking_s = statistics.median(run.loop.times.save_s / sizes["saves"] for run in with_saves)
    costs = [(a.seconds - b.seconds) / sizes["saves"] for a, b in zip(with_saves, without, strict=True)]
    cost_steps = statistics.median(costs) / normal_s
    demo_every = yaml.safe_load(DEMO.read_text())["train"]["checkpoint_every"]
    timing.show(
        {
            "machine": timing.machine(),
            "sizes": sizes,
            "state MB": sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6,
            "step ms": 1000 * normal_s,
            "blocking, steps": blocking_s / normal_s,
            "while saving over normal": statistics.median(during) / normal_s if during else None,
            "steps while saving": len(during) / (sizes["rounds"] * sizes["saves"]),
            "cost of a save, steps": cost_steps,
            "costs, steps": [c / normal_s for c in costs],
            "share of the demo's time": cost_steps / demo_every,
            "aims": {"blocking, steps": 1.0, "while saving over normal": 1.1, "share": 0.03},
        }
    )


if __name__ == "__main__":
    main()
