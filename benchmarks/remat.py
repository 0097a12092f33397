"""The memory that each remat policy saves in a training step, and its cost in time. JSON on standard output.

    python -m benchmarks.remat [--quick]

The step of ``model_step.py``. saved: the share by which the compiled step's temporaries (XLA's memory analysis) are
smaller than with "none", which keeps everything; activations: the same after taking the bytes of the gradients from
both. time: over "none", in turns. Aim, for the default policy: 0.80 saved for at most 1.20 of the time.
"""

from __future__ import annotations

import math

import jax

from benchmarks import timing
from benchmarks.model_step import NUM_TOKENS, Ours, make_batch
from model.config import from_variant
from model.encoder import REMAT_POLICIES

SIZES = {
    "quick": {"variant": "imp-tiny", "global_batch_size": 8, "rounds": 2, "calls": 1},
    "cpu": {"variant": "imp-s", "global_batch_size": 8, "rounds": 7, "calls": 1},
    "gpu": {"variant": "imp-l", "global_batch_size": 64, "rounds": 11, "calls": 5},
}


def main() -> None:
    args = timing.arguments(__doc__)
    sizes = timing.pick(SIZES, quick=args.quick)
    config = from_variant(sizes["variant"], dtype=sizes["dtype"])
    ours = Ours(config)
    gradients = sum(4 * math.prod(x.shape) for group in ours.state.values() for x in jax.tree.leaves(group["params"]))
    batch, _, _ = make_batch(sizes["global_batch_size"])
    temporaries, sides = {}, {}
    for remat in REMAT_POLICIES:
        step = ours.compile(remat=remat, global_batch_size=sizes["global_batch_size"])
        temporaries[remat] = step.executable.memory_analysis().temp_size_in_bytes
        timing.say(f"{remat}: {temporaries[remat] / 2**20:.0f} MiB of temporaries")
        sides[remat] = ours.side(step, batch)
    times = timing.in_turns(sides, rounds=sizes["rounds"], calls=sizes["calls"])
    activations = {remat: size - gradients for remat, size in temporaries.items()}
    saved, over = _saved(temporaries), times.over("none")
    timing.show(
        {
            "machine": timing.machine(),
            "sizes": sizes | {"num_tokens": NUM_TOKENS},
            "default": config.remat,
            "saved by the default": saved[config.remat],
            "time of the default over none": over[config.remat],
            "aims": {"saved": 0.8, "time": 1.2},
            "saved": saved,
            "saved of activations": _saved(activations),
            "time over none": over,
            "time over none, processor time": times.cpu_over("none"),
            "temporaries, MiB": {remat: size / 2**20 for remat, size in temporaries.items()},
            "gradients, MiB": gradients / 2**20,
            "ms": {remat: 1000 * s for remat, s in times.seconds().items()},
        }
    )


def _saved(sizes: dict[str, int]) -> dict[str, float]:
    return {remat: 1 - size / sizes["none"] for remat, size in sizes.items() if remat != "none"}


if __name__ == "__main__":
    main()
