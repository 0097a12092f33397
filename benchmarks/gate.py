"""The step coordinator's CPU time a step, with simulated ranks that call it as the product's own gates do.

    python -m benchmarks.gate [--ranks 256] [--steps 300]

Every rank tells of its batch two steps ahead and asks for two steps ahead, in a random order a step. The bound of 5 ms
holds for all that the coordinator's process does for a step: taking the news, judging the rejects, waking the ranks.
Exits with 1 above it. JSON on standard output. The simulated ranks run in the same process and are counted too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time

from pipeline.train.reject_limit import Draws, RejectCounts
from pipeline.train.step_gate import StepCoordinator

# Maximum CPU seconds a step.
MAX_STEP_S = 0.005
# Steps for which a rank has batches, and asks, before the one that runs.
_AHEAD = 2


async def cpu_s(num_ranks: int, num_steps: int) -> float:
    """CPU seconds of all steps."""
    coordinator, draw = StepCoordinator(), random.Random(0)
    await coordinator.begin(num_ranks, 0, RejectCounts({"pets": 0.05}))
    orders = [draw.sample(range(num_ranks), num_ranks) for _ in range(16)]
    asked: dict[int, list[asyncio.Task]] = {}
    began = time.process_time()
    for step in range(num_steps + _AHEAD):
        order = orders[step % len(orders)]
        # The ranks wait for a step before they have its batch: the case in which they must be woken.
        asked[step] = [asyncio.ensure_future(coordinator.grant(1, step)) for _ in order]
        await asyncio.sleep(0)
        if step >= _AHEAD:
            for rank in order:
                await coordinator.ready(1, rank, step - _AHEAD, Draws("pets", 16, 0))
            grants = await asyncio.gather(*asked.pop(step - _AHEAD))
            if set(grants) != {(True, grants[0][1], ("pets", 16 * num_ranks * (step - _AHEAD + 1), 0))}:
                raise RuntimeError(f"step {step - _AHEAD}: the ranks were given different answers: {set(grants)}")
    spent = time.process_time() - began
    for task in (task for tasks in asked.values() for task in tasks):
        task.cancel()
    return spent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=256)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    step_s = min(asyncio.run(cpu_s(arguments.ranks, arguments.steps)) for _ in range(3)) / arguments.steps
    kept = step_s <= MAX_STEP_S
    print(json.dumps({"ranks": arguments.ranks, "cpu_ms_a_step": round(1e3 * step_s, 3), "kept": kept}))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
