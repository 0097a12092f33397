"""Estimates for the rest of a run: time, from FLOPs first and then from its own steps; price and memory."""

from __future__ import annotations

import collections
import statistics
import time
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp

from model.config import ModelConfig
from pipeline.train import devices
from pipeline.train.accelerators import price_of
from pipeline.train.memory_fit import advice
from pipeline.train.memory_need import Need, gib
from pipeline.train.mixture.shape_budget import GraphCost

# Share of a plain matrix product's rate that whole training steps reach: norms, softmax, moving tokens, the optimizer
# and rematerialization are not model FLOPs.
_EFFICIENCY = 0.2
# Seconds of a step of any size: calls, optimizer, metrics.
_STEP_S = 0.005
# FLOPs of the product that is timed, on a CPU and on an accelerator.
_CPU_FLOPS, _DEVICE_FLOPS = 1e9, 4e11
# Seconds for which it is repeated.
_TIMED_S = 0.2
# Maximum number of its rows.
_MAX_ROWS = 1 << 15
# Steps of one (task, variant), and of the run, that an estimate averages over.
_RECENT, _RECENT_WAITS = 16, 64
# First steps of a process, whose waits for data are those of its start and do not count.
_START_STEPS = 8


def measured_flops_per_s(config: ModelConfig) -> float:
    """FLOP/s of all devices together in products of the model's feed-forward size and type, in less than a second."""
    device = jax.local_devices()[0]
    flops_a_row = 4 * config.width * config.mlp_dim
    wanted = _CPU_FLOPS if device.platform == "cpu" else _DEVICE_FLOPS
    rows = int(min(_MAX_ROWS, max(128, wanted / flops_a_row)))
    with jax.default_device(device):
        shapes = ((rows, config.width), (config.width, config.mlp_dim), (config.mlp_dim, config.width))
        x, up, down = (jnp.full(shape, 1e-3, config.dtype) for shape in shapes)
        product = jax.jit(lambda x, up, down: (x @ up) @ down)
        product(x, up, down).block_until_ready()
        best, ends = float("inf"), time.perf_counter() + _TIMED_S
        while time.perf_counter() < ends:
            began = time.perf_counter()
            product(x, up, down).block_until_ready()
            best = min(best, time.perf_counter() - began)
    return rows * flops_a_row / best * jax.device_count()


class Forecast:
    """The duration of steps, by (task, variant).

    It is the median of the latest ones; for one that has not run yet it follows from its FLOPs, at the rate of the
    others. The first step of each is unusual: memory is touched for the first time, and on CPUs the next graphs compile
    beside it.

    budget: the graphs that the run may use, with their shares of the steps; without one, the shares seen so far count.
    flops_per_s: the rate before the first step, None if it is unknown.
    """

    def __init__(self, budget: Iterable[GraphCost] = (), *, flops_per_s: float | None = None) -> None:
        self._shares = {(b.task, b.variant): b.share for b in budget}
        rate = flops_per_s and flops_per_s * _EFFICIENCY
        self._predicted = {(b.task, b.variant): b.flops / rate + _STEP_S for b in budget} if rate else {}
        self._first: dict[tuple[str, str], float] = {}
        self._real: dict[tuple[str, str], collections.deque] = {}
        self._waits, self._steps = collections.deque(maxlen=_RECENT_WAITS), 0

    def add(self, record: Mapping) -> None:
        """Adds a step that has run. record: a line of metrics.jsonl."""
        key = record["task"], record["variant"]
        if key in self._first:
            self._real.setdefault(key, collections.deque(maxlen=_RECENT)).append(record["step_s"])
        self._first.setdefault(key, record["step_s"])
        self._steps += 1
        if self._steps > _START_STEPS:
            self._waits.append(record["data_wait_s"])

    def step_s(self) -> float | None:
        """Seconds of an average later step, its wait for data included; None if nothing is known."""
        real = {key: statistics.median(values) for key, values in self._real.items()}
        shares = self._shares or {key: len(self._real.get(key, [0])) for key in self._first}
        both = [key for key in real if key in self._predicted]
        off = sum(real[k] for k in both) / sum(self._predicted[k] for k in both) if both else 1.0
        known = self._first | {key: off * s for key, s in self._predicted.items()} | real
        total = sum(share for key, share in shares.items() if key in known)
        if not total:
            return None
        waits = sum(self._waits) / len(self._waits) if self._waits else 0.0
        return sum(shares.get(key, 0.0) * s for key, s in known.items()) / total + waits


def lines(forecast: Forecast, need: Need, *, num_steps: int) -> list[str]:
    """Lines to print before the first step: time, price where it is known, memory, and whether it fits.

    num_steps: those still to run.
    """
    step_s, needed = forecast.step_s(), need.total()
    limit, where = devices.memory_limit()
    if where == "this machine":
        # The program and its libraries take memory there too.
        needed += devices.memory()["rss_bytes"]
    memory = f"about {gib(needed)} of memory"
    if limit:
        verdict = "fits" if needed <= limit else "may not fit"
        memory = f"about {gib(needed)} of the {gib(limit)} of {where}: {verdict}"
    out = []
    if step_s is not None:
        time_s = f"{in_words(step_s)} a step here, {in_words(step_s * num_steps)} for {num_steps:,} steps"
        out.append(f"estimate: {time_s}{_price(step_s * num_steps)}; {memory}")
    if limit and needed > limit:
        out.append(f"warning: a step needs about {gib(needed)}, {where} has {gib(limit)}; {advice(need, limit)}")
    return out


def _price(seconds: float) -> str:
    """A run's price at list price on the devices at hand; nothing where that is unknown."""
    hour = price_of(jax.devices()[0].device_kind)
    if hour is None:
        return ""
    dollars = hour * jax.device_count() * seconds / 3600
    return f", ${dollars:,.2f} at list price" if dollars < 100 else f", ${dollars:,.0f} at list price"


def in_words(seconds: float) -> str:
    """A duration in its largest unit, to two digits."""
    for unit, size, minimum in (("days", 86400.0, 3), ("h", 3600.0, 2), ("min", 60.0, 2)):
        if seconds >= minimum * size:
            return f"{_two_digits(seconds / size)} {unit}"
    return f"{_two_digits(seconds)} s"


def _two_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.2g}"
