"""CPU time a step of what decides on steps and blocks, at any number of ranks, decoders and rows. JSON.

    python -m benchmarks.gate [--ranks 256] [--decoders 1000] [--steps 300]

head: the step coordinator. Every simulated rank tells of its batch two steps ahead and asks for two steps ahead, in a
random order; the driver asks for news once a step. Taking the news, judging the rejects and waking the ranks count,
as do the ranks, which run in the same process; what Ray spends on a call does not.
rank: one rank's feed, queues, order of blocks and gate, in a run of 20 tasks over 10^10 rows each, with its part of the
decoders, whose own work is left out. samples: naming the samples of a rank's part of a batch, 256 of 65,536.

Exits with 1 if head or rank is above 5 ms. The smallest of three rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.plane import make_schedule
from pipeline.cluster.block_order import BlockOrder, TaskBlocks
from pipeline.data.blocks import Block
from pipeline.data.order import Order
from pipeline.data.plan import Arrival, Row
from pipeline.data.task_queue import Fetched, TaskQueues
from pipeline.data.wire import to_arrow
from pipeline.train.feed import Feed
from pipeline.train.mixture.schedule import Schedule
from pipeline.train.quarantine import Quarantine
from pipeline.train.reject_limit import Draws, RejectCounts
from pipeline.train.step_gate import StepCoordinator, StepGate

# Maximum CPU seconds a step.
MAX_STEP_S = 0.005
# Steps for which a rank has batches, and asks, before the one that runs.
_AHEAD = 2
TASKS, ROWS = 20, 10**10
# Samples of a rank's part of the largest batches of the paper.
SAMPLES = 256
ROW_BYTES, BUDGET = 1 << 20, 1 << 30


async def head_cpu_s(num_ranks: int, num_steps: int) -> float:
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
            await coordinator.news()
    spent = time.process_time() - began
    for task in (task for tasks in asked.values() for task in tasks):
        task.cancel()
    return spent


class Decoders:
    """One rank's decoders: they make rows of a sample each at once. cpu_s: what that has cost."""

    def __init__(self, number: int):
        self.number, self.cpu_s = number, 0.0

    def max_unfinished(self) -> int:
        return 2 * self.number

    def note(self, unfinished: int, *, waits: bool) -> None:
        """No one is asked for more."""

    def lack(self) -> str:
        return ""

    def wanted(self) -> int:
        return 0

    def blocks(self, order: BlockOrder, variants: dict[str, str]) -> Iterator[Fetched]:
        """The blocks of an order, as long as there are any."""
        while not order.ended and not order.exhausted():
            description = order.take(0)
            if description is None:
                order.rest(0.2)
                continue
            began = time.thread_time()
            block = Block.described(description)
            arrays = {"vision/tokens": np.zeros((1, 4, 768), np.uint8)}
            rows = [
                Row(block.task, batch, block.rank, variants[block.task], [f"{batch}"], [], arrays)
                for batch in range(block.start, block.stop)
            ]
            table = to_arrow(rows)
            self.cpu_s += time.thread_time() - began
            yield Fetched(table, Arrival(now := time.perf_counter(), now))


def rank_cpu_s(schedule: Schedule, folder: Path, *, rank: int, num_decoders: int) -> float:
    """CPU seconds of all steps of one rank."""
    decoders = Decoders(num_decoders)
    variants = {name: task.variants[0].name for name, task in schedule.tasks.items()}
    tasks = [
        TaskBlocks(name, 0, schedule.batches_at_most(name), schedule.share(name), rows_per_block=4, row_bytes=ROW_BYTES)
        for name in schedule.tasks
    ]
    order = BlockOrder(tasks, schedule, rank=rank, max_bytes=BUDGET, decoders=decoders)
    gate = StepGate()
    gate.open(RejectCounts({"set": 0.05}))
    began = time.process_time()
    queues = TaskQueues(decoders.blocks(order, variants), order).by_task
    journal = Quarantine(folder, rank=rank)
    feed = Feed(schedule, queues, to_devices=lambda arrays: arrays, quarantine=journal, gate=gate)
    for step in schedule.steps:
        gate.next_action(step)
        feed.next()
    spent = time.process_time() - began - decoders.cpu_s
    feed.close()
    return spent


def samples_cpu_s(num_batches: int, *, rank: int) -> float:
    """CPU seconds of naming the samples of one rank's part of as many batches."""
    order, began = Order(1, "task", ROWS), time.process_time()
    for batch in range(num_batches):
        first = 65536 * batch + SAMPLES * rank
        order.rows(np.arange(first, first + SAMPLES))
    return time.process_time() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=256)
    parser.add_argument("--decoders", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    steps, last = arguments.steps, arguments.ranks - 1
    _, schedule = make_schedule(TASKS, steps)
    with tempfile.TemporaryDirectory() as name:
        own = {"rank": last, "num_decoders": max(1, arguments.decoders // arguments.ranks)}
        rounds = [
            (
                asyncio.run(head_cpu_s(arguments.ranks, steps)),
                rank_cpu_s(schedule, Path(name) / str(number), **own),
                samples_cpu_s(steps, rank=last),
            )
            for number in range(3)
        ]
    head, rank, samples = (min(costs) / steps for costs in zip(*rounds, strict=True))
    kept = max(head, rank) <= MAX_STEP_S
    costs = {"head": head, "rank": rank, "samples": samples}
    found = {f"{name}_cpu_ms_a_step": round(1e3 * value, 3) for name, value in costs.items()}
    print(json.dumps({"ranks": arguments.ranks, "decoders": arguments.decoders, "rows": ROWS} | found | {"kept": kept}))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
