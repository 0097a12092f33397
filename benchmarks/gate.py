"""CPU time a step of what decides on steps and blocks, at any number of ranks, decoders and rows. JSON.

    python -m benchmarks.gate [--ranks 256] [--decoders 1000] [--steps 300]

head: the step coordinator's actor on a real Ray, with all that Ray spends on its calls; group: the busiest of the
actors that stand for a group of ranks, which run on the ranks' machines. The ranks, of four processes, ask as those of
a run do, and the driver asks for news as often as it does then.
rank: one rank's feed, queues, order of blocks and gate, in a run of 20 tasks over 10^10 rows each, with its part of the
decoders, whose own work is left out. samples: naming the samples of a rank's part of a batch, 256 of 65,536.

Exits with 1 if head or rank is above 5 ms. The smallest of three rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray

from benchmarks.plane import make_schedule
from pipeline.cluster.block_order import BlockOrder, TaskBlocks
from pipeline.cluster.step_actors import make_coordinator, open_requests
from pipeline.data.blocks import Block
from pipeline.data.order import Order
from pipeline.data.plan import Arrival, Row
from pipeline.data.task_queue import Fetched, TaskQueues
from pipeline.data.wire import to_arrow
from pipeline.train.feed import Feed
from pipeline.train.mixture.schedule import Schedule
from pipeline.train.quarantine import Quarantine
from pipeline.train.reject_limit import Draws, RejectCounts
from pipeline.train.step_gate import StepGate

# Maximum CPU seconds a step.
MAX_STEP_S = 0.005
# Processes of simulated ranks; steps before those that are measured; seconds between the driver's looks for news.
PROCESSES, WARM_UP, NEWS_S = 4, 30, 0.2
TASKS, ROWS = 20, 10**10
# Samples of a rank's part of the largest batches of the paper.
SAMPLES = 256
ROW_BYTES, BUDGET = 1 << 20, 1 << 30


class Ranks:
    """Ranks of one process: their feeds are ahead of their loops, which are where the step coordinator lets them be.

    requests: of each rank.
    """

    def __init__(self, coordinator: Any, ranks: range, world_size: int) -> None:
        # A rank waits for the actor of its group, which the group's first rank starts.
        with ThreadPoolExecutor(len(ranks)) as pool:
            asking = [pool.submit(open_requests, coordinator, 1, 0, rank=rank, world_size=world_size) for rank in ranks]
            self.requests = [one.result() for one in asking]
        self._world_size, self._next = world_size, 0

    def run(self, num_steps: int) -> None:
        """Takes all ranks through as many steps more."""
        for step in range(self._next, self._next + num_steps):
            for requests in self.requests:
                requests.ready(step, Draws("pets", SAMPLES, 0))
            total = "pets", SAMPLES * self._world_size * (step + 1), 0
            for answer in [requests.answer(step) for requests in self.requests]:
                run, _, found = answer.result()
                if not run or found != total:
                    raise RuntimeError(f"step {step}: expected {total}, found {answer.result()}")
        self._next += num_steps


def calls_cpu_s(num_ranks: int, num_steps: int) -> tuple[float, float]:
    """CPU seconds of all steps of the coordinator's process, and of the busiest of its groups', with a real Ray."""
    ray.init(num_cpus=PROCESSES, logging_level="error", include_dashboard=False)
    coordinator = make_coordinator(num_ranks)
    ray.get(coordinator.begin.remote(num_ranks, 0, RejectCounts({"pets": 0.05})))
    bounds = [num_ranks * i // PROCESSES for i in range(PROCESSES + 1)]
    parts = [range(*pair) for pair in itertools.pairwise(bounds) if pair[0] < pair[1]]
    processes = [ray.remote(Ranks).remote(coordinator, part, num_ranks) for part in parts]
    ray.get([process.run.remote(WARM_UP) for process in processes])
    names = {child: " ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)}
    head = next(child for child, name in names.items() if "StepCoordinator" in name)
    groups = [child for child, name in names.items() if "GroupActor" in name]
    before = {child: _cpu_s(child) for child in (head, *groups)}
    running = [process.run.remote(num_steps) for process in processes]
    while ray.wait(running, num_returns=len(running), timeout=NEWS_S)[1]:
        ray.get(coordinator.news.remote())
    ray.get(running)
    spent = {child: _cpu_s(child) - before[child] for child in before}
    ray.shutdown()
    return spent[head], max((spent[group] for group in groups), default=0.0)


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


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
                rank_cpu_s(schedule, Path(name) / str(number), **own),
                samples_cpu_s(steps, rank=last),
                *calls_cpu_s(arguments.ranks, steps),
            )
            for number in range(3)
        ]
    rank, samples, head, group = (min(costs) / steps for costs in zip(*rounds, strict=True))
    kept = max(head, rank) <= MAX_STEP_S
    costs = {"head": head, "group": group, "rank": rank, "samples": samples}
    found = {f"{name}_cpu_ms_a_step": round(1e3 * value, 3) for name, value in costs.items()}
    print(json.dumps({"ranks": arguments.ranks, "decoders": arguments.decoders, "rows": ROWS} | found | {"kept": kept}))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
