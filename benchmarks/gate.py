"""CPU time a step of what decides on steps and blocks, at any number of ranks, decoders and rows. JSON.

    python -m benchmarks.gate [--ranks 256] [--decoders 1000] [--steps 300]

head: the step coordinator's process on a real Ray, with all that Ray spends on its calls; group: that of an actor that
stands for a group of ranks, on the machine of one of them. Each is called as often as it would be in a run, and by the
driver five times a second; its cost does not depend on other machines' processes, which here would share its cores.
At last all ranks run through all groups' actors, and must be given the same answers.
rank: one rank's feed, queues, order of blocks and gate, in a run of 20 tasks over 10^10 rows each, with its part of the
decoders, whose own work is left out. samples: naming the samples of a rank's part of a batch, 256 of 65,536.

Exits with 1 if head or rank is above 5 ms. Of rank and samples the smallest of three rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray

from benchmarks.plane import make_schedule
from pipeline.cluster.block_order import BlockOrder, TaskBlocks
from pipeline.cluster.step_actors import make_coordinator, open_requests, start_group
from pipeline.data.blocks import Block
from pipeline.data.order import Order
from pipeline.data.plan import Arrival, Row
from pipeline.data.task_queue import Fetched, TaskQueues
from pipeline.data.wire import to_arrow
from pipeline.train.feed import Feed
from pipeline.train.mixture.schedule import Schedule
from pipeline.train.quarantine import Quarantine
from pipeline.train.reject_limit import Draws, RejectCounts
from pipeline.train.step_coordinator import MAX_CALLERS, callers_of_coordinator
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


def whole_tree(num_ranks: int, num_steps: int) -> None:
    """Takes ranks through their groups to the coordinator. Raises if one of them was given another answer."""
    coordinator = make_coordinator(num_ranks)
    ray.get(coordinator.begin.remote(num_ranks, 0, RejectCounts({"pets": 0.05})))
    bounds = [num_ranks * i // PROCESSES for i in range(PROCESSES + 1)]
    parts = [range(*pair) for pair in itertools.pairwise(bounds) if pair[0] < pair[1]]
    processes = [ray.remote(Ranks).remote(coordinator, part, num_ranks) for part in parts]
    ray.get([process.run.remote(num_steps) for process in processes])


def head_cpu_s(num_ranks: int, num_steps: int) -> float:
    """CPU seconds of the coordinator's process, called as the groups of all ranks call it, and by the driver."""
    coordinator = make_coordinator(num_ranks)
    ray.get(coordinator.begin.remote(num_ranks, 0, RejectCounts({"pets": 0.05})))
    call = partial(coordinator.step.remote, 1)
    callers = callers_of_coordinator(num_ranks)
    asks = {ranks.start: (call, Draws("pets", SAMPLES * len(ranks), 0)) for ranks in callers}
    with ThreadPoolExecutor(1) as news:
        looks = news.submit(_look_for_news, coordinator)
        spent = _called_cpu_s(coordinator, asks, num_steps)
        ray.get(coordinator.stop.remote())
        looks.result()
    return spent


def _look_for_news(coordinator: Any) -> None:
    while ray.get(coordinator.last.remote()) is None:
        ray.get(coordinator.news.remote())
        time.sleep(NEWS_S)


def group_cpu_s(num_steps: int) -> float:
    """CPU seconds of the process of a group that has as many callers as a group may."""
    coordinator, ranks = make_coordinator(1), range(MAX_CALLERS)
    ray.get(coordinator.begin.remote(1, 0, RejectCounts({})))
    group = start_group(ranks, partial(coordinator.step.remote, 1))
    return _called_cpu_s(group, {rank: (group.step.remote, Draws("pets", SAMPLES, 0)) for rank in ranks}, num_steps)


def _called_cpu_s(actor: Any, asks: dict[int, tuple[Callable, Draws]], num_steps: int) -> float:
    """CPU seconds of an actor's process while it is asked for steps, once it is warm."""
    process = psutil.Process(ray.get(actor.__ray_call__.remote(_pid)))
    before = 0.0
    for step in range(WARM_UP + num_steps):
        before = _cpu_s(process) if step == WARM_UP else before
        grants = ray.get([call(first, step, draws) for first, (call, draws) in asks.items()])
        if not all(run for run, _, _ in grants):
            raise RuntimeError(f"step {step}: refused")
    return _cpu_s(process) - before


def _pid(actor: object) -> int:
    return os.getpid()


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


class Decoders:
    """One rank's decoders: they make rows of a sample each at once. cpu_s: what that has cost."""

    def __init__(self, number: int):
        self.number, self.cpu_s = number, 0.0

    @property
    def num_decoders(self) -> int:
        return self.number

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
            (rank_cpu_s(schedule, Path(name) / str(number), **own), samples_cpu_s(steps, rank=last))
            for number in range(3)
        ]
    rank, samples = (min(costs) / steps for costs in zip(*rounds, strict=True))
    ray.init(num_cpus=PROCESSES, logging_level="error", log_to_driver=False, include_dashboard=False)
    head, group = (cost / steps for cost in (head_cpu_s(arguments.ranks, steps), group_cpu_s(steps)))
    whole_tree(arguments.ranks, WARM_UP)
    kept = max(head, rank) <= MAX_STEP_S
    costs = {"head": head, "group": group, "rank": rank, "samples": samples}
    found = {f"{name}_cpu_ms_a_step": round(1e3 * value, 3) for name, value in costs.items()}
    print(json.dumps({"ranks": arguments.ranks, "decoders": arguments.decoders, "rows": ROWS} | found | {"kept": kept}))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
