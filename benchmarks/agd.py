"""Alternating between twenty structures against each of them alone. JSON on standard output.

    python -m benchmarks.agd [--quick]

The training loop (``pipeline/train/loop.py``: feed, compiler, groups updated in place, metrics of every step read) runs
twenty structures, all kinds of objective and modality at five sizes, over one state. A round runs each structure alone,
some steps in a row, and then as many steps of each in a random order. ratio: the time of the first over that of the
second, median over the rounds; aim: at least 0.98. memory: the largest step of the twenty over the largest one alone
(aim: at most 1.05): on GPUs the peak in use, on CPUs what the compiler plans; rss: of this process, before and after.
"""

from __future__ import annotations

import random
import statistics
import time

import jax
import numpy as np

from benchmarks import timing
from benchmarks.memory_feed import Batches, make_loop
from model.config import OptimizerConfig, from_variant
from model.imp import Imp
from model.step import compile_step, init_state
from model.structure import InputShape, Structure
from pipeline.train.devices import memory

SIZES = {
    "quick": {"variant": "imp-tiny-moe", "tokens": (4, 8), "budget": 32, "rounds": 1, "steps": 2},
    "cpu": {"variant": "imp-tiny-moe", "tokens": (4, 8, 16, 32, 64), "budget": 512, "rounds": 9, "steps": 5},
    "gpu": {"variant": "imp-s-moe", "tokens": (64, 128, 256, 512, 1024), "budget": 65_536, "rounds": 11, "steps": 20},
}
OPTIMIZER = OptimizerConfig(peak_learning_rate=1e-4, warmup_steps=10, num_steps=1_000_000)


def structures(tokens: tuple[int, ...], budget: int) -> list[Structure]:
    """Four tasks at every number of vision tokens a sample, at equal vision tokens a step."""
    found = []
    for count in tokens:
        batch = budget // count
        image, video = InputShape("vision", count, 768, 3), InputShape("vision", count, 3072, 3)
        sound, text = InputShape("audio", 64, 256, 2), InputShape("text", 16, 0, 1)
        classes = {"classifier": "set", "num_classes": 100, "classes": tuple(range(100))}
        found += [
            Structure((("softmax", 1.0),), batch, (image,), **classes),
            Structure((("nce", 1.0),), batch, (image, text)),
            Structure((("nce", 1.0),), batch, (video, sound)),
            Structure((("nce", 1.0),), batch, (video, sound, text)),
        ]
    return found


def planned(step) -> int:
    plan = step.executable.memory_analysis()
    return plan.argument_size_in_bytes + plan.temp_size_in_bytes


def main() -> None:
    args = timing.arguments(__doc__)
    sizes = timing.pick(SIZES, quick=args.quick)
    every = structures(sizes["tokens"], sizes["budget"])
    imp = Imp.for_structures(from_variant(sizes["variant"], dtype=sizes["dtype"]), every)
    state = init_state(imp.init(0))
    compiled, compile_s = {}, []
    for number, structure in enumerate(every):
        began = time.perf_counter()
        compiled[structure] = compile_step(imp, structure, OPTIMIZER)
        compile_s.append(time.perf_counter() - began)
        timing.say(f"compiled {number + 1} of {len(every)}: {compile_s[-1]:.1f} s")
    batches = Batches(every)
    peak_alone, rss_before = _peak_of_largest(compiled, state, batches), memory()["rss_bytes"]

    def run(order: list[Structure]) -> float:
        loop = make_loop(state, [batches[s] for s in order], compiled)
        began = time.perf_counter()
        loop.run()
        return time.perf_counter() - began

    run(every)
    draw = random.Random(0)
    alone, alternating = [], []
    for number in range(sizes["rounds"]):
        alone.append([run([s] * sizes["steps"]) for s in every])
        order = every * sizes["steps"]
        draw.shuffle(order)
        # In pieces of equal length, so that both sides pay for the start of equally many loops.
        alternating.append([run(order[i :: len(every)]) for i in range(len(every))])
        timing.say(f"round {number + 1}: alone {sum(alone[-1]):.2f} s, alternating {sum(alternating[-1]):.2f} s")
    ratios = [sum(a) / sum(b) for a, b in zip(alone, alternating, strict=True)]
    alone_s = np.median(np.array(alone), axis=0) / sizes["steps"]
    result = {
        "machine": timing.machine(),
        "sizes": sizes,
        "structures": len(every),
        "ratio": statistics.median(ratios),
        "aim": 0.98,
        "ratios": ratios,
        "step alone, ms": [1000 * s for s in alone_s.tolist()],
        "compile_s": sum(compile_s),
        "rss MiB": {"one structure": rss_before / 2**20, "all": memory()["rss_bytes"] / 2**20},
        "memory aim": 1.05,
    }
    if peak_alone is None:
        largest = max(planned(step) for step in compiled.values())
        together = max(planned(compile_step(imp, s, OPTIMIZER)) for s in _largest(compiled))
        result |= {"memory, planned": largest / together, "largest step MiB": largest / 2**20}
    else:
        result["memory, peak in use"] = jax.devices()[0].memory_stats()["peak_bytes_in_use"] / peak_alone
    timing.show(result)


def _largest(compiled: dict) -> list[Structure]:
    return [max(compiled, key=lambda s: planned(compiled[s]))]


def _peak_of_largest(compiled: dict, state: dict, batches: Batches) -> int | None:
    """The device's peak after the largest structure alone has run; None if it does not say."""
    for structure in _largest(compiled):
        make_loop(state, [batches[structure]] * 3, compiled).run()
    stats = jax.devices()[0].memory_stats()
    return stats and stats.get("peak_bytes_in_use")


if __name__ == "__main__":
    main()
