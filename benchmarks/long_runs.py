"""What the files of a very long run cost: its metrics, its report, its rejects.

    python -m benchmarks.long_runs [--steps 1000000] [--rejects 10000000] [--folder /tmp]

Writes a metrics.jsonl of 20 tasks with one line a step, as the recorder writes it, and a journal of rejects. Measures
each reader in a process of its own: CPU seconds, and the megabytes by which its memory grew at most. JSON on standard
output.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.report.quarantine_table import write_table
from pipeline.report.report import write_report
from pipeline.train.quarantine import known_bad
from pipeline.train.telemetry.recorder import Recorder
from pipeline.train.telemetry.spec import LoggingSpec
from pipeline.train.telemetry.step_log import cut_back

TASKS = [f"task_{number}" for number in range(20)]
LAYERS, EXPERTS = 6, 8
# Steps that the recorder is timed over; its lines are then repeated with other steps.
RECORDED = 10_000


def step_record(step: int, draw: random.Random) -> dict:
    """What the loop hands to the recorder."""
    layers = [[draw.random() for _ in range(EXPERTS)] for _ in range(LAYERS)]
    routing = {"expert_load": layers, "expert_slots": layers, "unrouted_fraction": [0.01] * LAYERS}
    loss = 5 + draw.gauss(0, 0.1)
    return {
        **{"step": step, "task": draw.choice(TASKS), "variant": "base", "loss": loss, "chance": 8.3, "finite": True},
        **{"examples": 4096, "tokens": 1 << 20, "task_steps": step // 20, "expected_steps": step / 20},
        **{"step_s": 0.5, "data_wait_s": 0.0, "compile_wait_s": 0.0, "grad_norm": 1 + draw.random()},
        **{"learning_rate": 1e-3, "temperatures": {"image-text": 0.07}, "moe": {"vision": routing, "text": routing}},
        "ids": [f"laion/{step:012d}"],
    }


def record(run_dir: Path) -> float:
    """CPU seconds of the recorder a step."""
    draw, flops = random.Random(0), dict.fromkeys([(name, "base") for name in TASKS], 10**9)
    records = [step_record(step, draw) for step in range(1, RECORDED + 1)]
    spec = LoggingSpec(progress="none", log_samples=True)
    recorder = Recorder(spec, run_dir=run_dir, rank=0, steps=range(RECORDED), flops=flops, shared_encoder=True)
    began = time.process_time()
    for one in records:
        recorder.record(one)
    spent = time.process_time() - began
    recorder.close()
    return spent / RECORDED


def repeat_metrics(run_dir: Path, num_steps: int) -> None:
    """Fills metrics.jsonl up to ``num_steps`` with the lines it has, each with its own step."""
    path = run_dir / "metrics.jsonl"
    tails = [line.partition(",")[2] for line in path.read_text().splitlines(keepends=True)]
    with open(path, "w") as file:
        file.writelines(f'{{"step": {step},{tails[step % len(tails)]}' for step in range(1, num_steps + 1))


def write_journal(run_dir: Path, count: int) -> None:
    """A journal with as many rejects, one in fifty of them transient."""
    (run_dir / "quarantine").mkdir()
    with open(run_dir / "quarantine" / "rank-0.jsonl", "w") as file:
        for number in range(count):
            name = f"laion/{number:012d}"
            line = {"id": name, "data_set": "laion", "source": f"s3://bucket/{name}.jpg", "reason": "not_decodable"}
            line |= {"detail": "cannot identify image file, broken data stream when reading"}
            if number % 50 == 0:
                line |= {"reason": "hung", "position": 7 * number, "attempt": 0}
            file.write(json.dumps(line | {"task": TASKS[number % len(TASKS)], "step": number // 10}) + "\n")


def measured(work: Callable[..., object], *arguments: object) -> dict:
    """CPU seconds and megabytes of memory of a piece of work, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (work, arguments))


def _measured(work: Callable[..., object], arguments: tuple) -> dict:
    # Linux's way to forget the peak so far.
    Path("/proc/self/clear_refs").write_text("5")
    before, began = peak_mb(), time.process_time()
    work(*arguments)
    return {"cpu_s": round(time.process_time() - began, 3), "grown_mb": round(peak_mb() - before)}


def peak_mb() -> float:
    """The largest resident set of this process so far."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1e3


def cut(path: Path, keep_steps: int) -> None:
    """Cuts metrics.jsonl back, as a start does."""
    cut_back(path, keep_steps=keep_steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--rejects", type=int, default=10_000_000)
    parser.add_argument("--folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        run_dir = Path(folder)
        found = {"recorder_us_a_step": round(1e6 * record(run_dir))}
        repeat_metrics(run_dir, arguments.steps)
        found["report"] = measured(write_report, run_dir)
        found["cut_back_1000_steps"] = measured(cut, run_dir / "metrics.jsonl", arguments.steps - 1000)
        write_journal(run_dir, arguments.rejects)
        found["known_bad"] = measured(known_bad, run_dir)
        found["quarantine_table"] = measured(write_table, run_dir)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
