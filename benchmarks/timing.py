"""Shared by the benchmarks of the model: the machine in words, sides timed in turns, one JSON object at the end."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from pipeline.host_memory import keep_freed_memory, machine_cpus

# A side of a comparison: makes a number of calls and waits for their results.
Side = Callable[[int], None]


def arguments(description: str, **flags: str) -> argparse.Namespace:
    """Command line with --quick and further on/off flags, name → help. On CPUs it also keeps freed memory, as training
    does."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that it runs")
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
    backend = "cpu" if on_cpu() else "gpu"
    return {"dtype": "float32" if on_cpu() else "bfloat16", **sizes["quick" if quick else backend]}


def machine() -> dict:
    device = {"device": jax.devices()[0].device_kind, "backend": jax.default_backend()}
    return device | {"cpu_cores": machine_cpus(), "jax": jax.__version__}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def waiting(call: Callable[[], Any]) -> Side:
    """``call`` as a side, which waits for the results of its last call."""

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

    sides: name → ``Side``.
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


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
