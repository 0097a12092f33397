"""What the benchmarks of the model share: the machine in words, sides timed in turns, one JSON object at the end."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time

import jax

from pipeline.host_memory import keep_freed_memory


def arguments(description: str, **flags: str) -> argparse.Namespace:
    """Command line with --quick and further on/off flags, name → help. On CPUs it also keeps freed memory, as training
    does."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy sizes: whether it runs, not how fast")
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parsed = parser.parse_args()
    if on_cpu():
        keep_freed_memory()
    return parsed


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def pick(sizes: dict, *, quick: bool) -> dict:
    """The entry "quick", "cpu" or "gpu" of a table of sizes, with the backend's dtype."""
    name = "quick" if quick else "cpu" if on_cpu() else "gpu"
    return {"dtype": "float32" if on_cpu() else "bfloat16", **sizes[name]}


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict:
    device = {"device": jax.devices()[0].device_kind, "backend": jax.default_backend()}
    return device | {"cpu_cores": cores(), "jax": jax.__version__}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def waiting(call):
    """``call`` as a side: runs it so many times and waits for the last results."""

    def run(calls: int) -> None:
        for _ in range(calls):
            out = call()
        jax.block_until_ready(out)

    return run


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one call of each side in every round: on the clock, and of this process's processor time.

    Processor time says more on a machine that others use too; of work that a GPU does it says nothing.
    """

    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]

    def seconds(self) -> dict[str, float]:
        return {name: statistics.median(values) for name, values in self.wall.items()}

    def over(self, base: str) -> dict[str, float]:
        """Side → median over the rounds of its time over that of ``base`` in the same round."""
        return _over(self.wall, base)

    def cpu_over(self, base: str) -> dict[str, float] | None:
        return _over(self.cpu, base) if on_cpu() else None


def _over(times: dict[str, list[float]], base: str) -> dict[str, float]:
    return {
        name: statistics.median(a / b for a, b in zip(values, times[base], strict=True))
        for name, values in times.items()
        if name != base
    }


def in_turns(sides: dict, *, rounds: int, calls: int = 1) -> Times:
    """Times every side once a round, after one call that is not counted; each round begins with another side.

    sides: name → function that makes a number of calls and waits.
    """
    for run in sides.values():
        run(1)
    names = list(sides)
    times = Times({name: [] for name in names}, {name: [] for name in names})
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            wall, cpu = time.perf_counter(), time.process_time()
            sides[name](calls)
            times.wall[name].append((time.perf_counter() - wall) / calls)
            times.cpu[name].append((time.process_time() - cpu) / calls)
        seconds = ", ".join(f"{name} {values[-1]:.4g}" for name, values in times.wall.items())
        say(f"round {number + 1} of {rounds}, seconds: {seconds}")
    return times


def show(result: dict) -> None:
    """The result with floats of four digits, as the one JSON object on standard output."""
    print(json.dumps(rounded(result), indent=1))


def rounded(value):
    if isinstance(value, dict):
        return {str(key): rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
