"""The data plane at any length: the first batch, memory, and CPU over bare decode, with a decoder that stands in.

    python -m benchmarks.plane [--steps 1000 244000 1000000] [--tasks 1 20] [--rows 150]

Real Ray, with the schedule, order and queues of a run of one rank; batches of 0.8 MB, each of which takes 50 ms of CPU
to "decode". Every case is a process of its own, and reads the rows of the first steps in their order. Prints a line of
JSON a case and, at last, the largest case over the smallest one; 30 to 60 s a case. "memory_mb": resident memory of the
driver above that before the streams were opened, schedule included. With --slow the fourth batch of the first task
takes 20 s: how many bytes are decoded meanwhile, and for how long training waits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil

from benchmarks.family_cpu import family_cpu_s, settle
from pipeline.data.known_rejects import NONE_KNOWN
from pipeline.data.plan import Row
from pipeline.data.run_data import DataSpec
from pipeline.data.spec import DataSetSpec, TaskSpec, TokenSpec
from pipeline.data.stream_spec import StreamSpec
from pipeline.data.variants import make_variant

# CPU seconds, and samples of 32 x 32 px, of a batch; 64 * 4 * 768 bytes and more.
DECODE_S, BATCH = 0.05, 256
SLOW_S = 20.0
# Times that streams are opened for their first batch alone.
OPENINGS = 3


class StandIn:
    """Makes a batch in ``DECODE_S`` of CPU from nothing but its number."""

    def __init__(self, task: str, slow_batch: int | None):
        self.task, self.slow_batch = task, slow_batch

    def row(self, index: int, *, rank: int, world_size: int) -> Row:
        if index == self.slow_batch:
            time.sleep(SLOW_S)
        until = time.thread_time() + DECODE_S
        while time.thread_time() < until:
            pass
        tokens = np.full((BATCH // world_size, 4, 768), index % 251, np.uint8)
        return Row(self.task, index, rank, "v", [f"{self.task}-{index}"], [], {"vision/tokens": tokens})


@dataclasses.dataclass(frozen=True)
class StandInStream(StreamSpec):
    slow_batch: int | None = None

    def maker(self) -> StandIn:
        return StandIn(self.task.name, self.slow_batch)


def make_schedule(num_tasks: int, num_steps: int, *, sampler: str = "multinomial"):
    from pipeline.train.mixture.schedule import MixtureSpec, Schedule
    from pipeline.train.mixture.spec import SamplerSpec

    variant = make_variant(num_frames=0, size=32, drop_rate=0.0, base=None, batch_size=BATCH, spec=TokenSpec())
    names = [f"task_{n:02d}" for n in range(num_tasks)]
    tasks = {
        name: TaskSpec(name, "set", (("softmax", 1.0),), ("image",), (variant,), weight=1.0, classified="image")
        for name in names
    }
    data_set = DataSetSpec(name="set", manifest="none", held_out={}, classes=("a", "b"))
    data = DataSpec(tasks, {"set": data_set}, TokenSpec(), {"set": {"num_rows": 10**10}})
    return data, Schedule(data, MixtureSpec(seed=1, num_steps=num_steps, sampler=SamplerSpec(kind=sampler)))


def open_streams(data: DataSpec, schedule, *, slow: bool):
    from pipeline.cluster.spec import Cluster
    from pipeline.cluster.task_streams import queues_of

    specs = {
        name: StandInStream(
            task=task,
            data_set=data.data_sets["set"],
            tokens=data.tokens,
            tokenizer=None,
            seed=1,
            fingerprint={},
            start=0,
            stop=schedule.batches_at_most(name),
            share=schedule.share(name),
            known_bad=NONE_KNOWN,
            cache_bytes=0,
            slow_batch=3 if slow and name == "task_00" else None,
        )
        for name, task in data.tasks.items()
    }
    return queues_of(specs, Cluster(), schedule)


def spilled_bytes(session: Path) -> int:
    """Bytes that Ray has written to disk because its store was full."""
    return sum(file.stat().st_size for folder in session.glob("ray_spilled*") for file in folder.rglob("*"))


def one_case(num_tasks: int, num_steps: int, *, rows: int, slow: bool) -> dict:
    import ray

    from pipeline.cluster.spec import Cluster
    from pipeline.cluster.start import start_ray

    start_ray(Cluster())
    session = Path(ray.init(ignore_reinit_error=True, logging_level="error").address_info["session_dir"])
    settle()
    own = psutil.Process()
    before, began = own.memory_info().rss, time.perf_counter()
    data, schedule = make_schedule(num_tasks, num_steps)
    plan_s = time.perf_counter() - began
    again = [read_rows(data, schedule, rows=1, slow=False)["first_batch_s"] for _ in range(OPENINGS)]
    result = read_rows(data, schedule, rows=rows, slow=slow)
    return {
        "tasks": num_tasks,
        "steps": num_steps,
        "plan_s": round(plan_s, 2),
        "cold_first_batch_s": again[0],
        # The fastest opening: others on the machine make one slower, nothing makes it faster.
        **result | {"first_batch_s": min(*again, result["first_batch_s"])},
        "memory_mb": round((own.memory_info().rss - before) / 1e6),
        "mb_spilled": round(spilled_bytes(session) / 1e6, 1),
    }


def read_rows(data: DataSpec, schedule, *, rows: int, slow: bool) -> dict:
    """Opens the streams and reads the rows of the first steps. Costs of a row are those of the second half of them."""
    began, half = time.perf_counter(), rows // 2
    queues = open_streams(data, schedule, slow=slow)
    seconds, cpu, ahead = [], [], 0
    for step in range(rows):
        row = queues.next(schedule[step].task)
        assert (row.task, row.batch) == (schedule[step].task, schedule[step].batch)
        seconds.append(time.perf_counter() - began)
        ahead = max(ahead, queues.order.bytes_ahead)
        if step in (half, rows - 1):
            cpu.append((family_cpu_s(), sum(one.taken - one.start for one in queues.order.tasks.values())))
    queues.close()
    assert queues.join(10)
    out = {"first_batch_s": round(seconds[0], 2)}
    if rows > 2:
        (cpu_half, made_half), (cpu_end, made_end) = cpu
        out |= {
            "s_a_row": round((seconds[-1] - seconds[half]) / (rows - 1 - half), 4),
            "cpu_over_bare": round((cpu_end - cpu_half) / (made_end - made_half) / DECODE_S, 3),
            "mb_ahead": round(ahead / 1e6, 1),
            "slowest_wait_s": round(max(np.diff(seconds)), 2),
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[1_000, 244_000, 1_000_000])
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 20])
    parser.add_argument("--rows", type=int, default=150)
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("--case", action="store_true", help="measure the one case here")
    arguments = parser.parse_args()
    if arguments.case:
        result = one_case(arguments.tasks[0], arguments.steps[0], rows=arguments.rows, slow=arguments.slow)
        print(json.dumps(result), flush=True)
        os._exit(0)
    more = ["--rows", str(arguments.rows), *(["--slow"] if arguments.slow else [])]
    cases = []
    for tasks in arguments.tasks:
        for steps in arguments.steps:
            command = [sys.executable, "-m", "benchmarks.plane", "--case", "--tasks", str(tasks), "--steps", str(steps)]
            done = subprocess.run([*command, *more], stdout=subprocess.PIPE, text=True, check=True)
            cases.append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(json.dumps(cases[-1]), flush=True)
    over = {name: [case[name] for case in cases] for name in ("first_batch_s", "memory_mb")}
    print(json.dumps({f"{name}_max_over_min": round(max(v) / min(v), 2) for name, v in over.items()}), flush=True)


if __name__ == "__main__":
    main()
