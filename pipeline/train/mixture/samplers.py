"""Samplers: the task of each step. All but the bandit are pure functions of (seed, step)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, Protocol

import numpy as np

from pipeline.data import order
from pipeline.train.mixture.bandit import Bandit
from pipeline.train.mixture.spec import SamplerSpec

# Number of steps that are computed together.
_CHUNK = 4096


class Sampler(Protocol):
    """Assigns a task to every step.

    names: the tasks. decided_until: the steps below it are decided. adaptive: later steps depend on losses.
    """

    names: tuple[str, ...]
    decided_until: float
    adaptive: bool

    def tasks(self, start: int, stop: int) -> np.ndarray:
        """Task index of the steps start .. stop - 1 (steps counted from 0), int64."""
        ...

    def expected(self, start: int, stop: int) -> np.ndarray:
        """(tasks,): the expected number of these steps for each task."""
        ...

    def observe(self, step: int, task: str, loss: float) -> None:
        """Takes the loss of a step, in order of the steps."""
        ...

    def state(self) -> dict:
        """The values that a resume needs beside the step, as JSON."""
        ...


def make_sampler(
    spec: SamplerSpec, weights: Mapping[str, float], *, seed: int, position: Mapping, step: int, num_steps: int
) -> Sampler:
    """Makes the sampler of a run that continues at ``step``. position: what ``Sampler.state`` returned before."""
    names = tuple(weights)
    if position.get("kind") != spec.kind:
        position = {}
    if spec.kind == "round_robin":
        return RoundRobin({n: spec.intervals.get(n, 1) for n in names if weights[n] > 0}, names=names)
    if spec.kind == "exact":
        return _exact(spec, weights, seed=seed, position=position, step=step, num_steps=num_steps)
    if spec.kind == "bandit":
        shares = spec.shares(list(weights.values()))
        return Bandit(names, shares, seed=seed, settings=spec.bandit, step=step, state=position)
    if spec.stages:
        return Multinomial(names, lambda steps: spec.shares(spec.weights_at(steps, weights)), seed=seed)
    constant = spec.shares(list(weights.values()))
    return Multinomial(names, lambda steps: constant, seed=seed)


def _exact(
    spec: SamplerSpec, weights: Mapping[str, float], *, seed: int, position: Mapping, step: int, num_steps: int
) -> Exact:
    """Continues the periods of ``position`` if they are of the same mixture and length, else starts one at ``step``."""
    names, shares = tuple(weights), spec.shares(list(weights.values()))
    same_mixture = position.get("shares") == dict(zip(names, shares.tolist(), strict=True))
    if same_mixture and spec.period in (None, position["period"]):
        return Exact(names, shares, seed=seed, anchor=position["anchor"], period=position["period"])
    return Exact(names, shares, seed=seed, anchor=step, period=spec.period or max(1, num_steps - step))


@dataclasses.dataclass
class _Stateless:
    """A sampler whose every step is decided from the start."""

    names: tuple[str, ...]
    decided_until: ClassVar[float] = math.inf
    adaptive: ClassVar[bool] = False

    def observe(self, step: int, task: str, loss: float) -> None:
        pass

    def state(self) -> dict:
        return {}


class Multinomial(_Stateless):
    """One draw per step from a multinomial (paper section 3.1: p proportional to the number of examples of a task).

    shares: function of steps (n,) → probabilities, (n, tasks), or (tasks,) if they do not change.
    """

    def __init__(self, names: tuple[str, ...], shares: Callable[[np.ndarray], np.ndarray], *, seed: int):
        super().__init__(tuple(names))
        self._shares, self._seed = shares, seed

    def tasks(self, start: int, stop: int) -> np.ndarray:
        """See ``Sampler.tasks``."""
        parts = [order.tasks_at(self._seed, steps, probabilities=self._shares(steps)) for steps in _chunks(start, stop)]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def expected(self, start: int, stop: int) -> np.ndarray:
        """See ``Sampler.expected``."""
        num_tasks = len(self.names)
        total = np.zeros(num_tasks)
        for steps in _chunks(start, stop):
            total += np.broadcast_to(self._shares(steps), (len(steps), num_tasks)).sum(0)
        return total


def _chunks(start: int, stop: int) -> Iterator[np.ndarray]:
    """Yields the steps in arrays that end at multiples of _CHUNK."""
    while start < stop:
        end = min(stop, (start // _CHUNK + 1) * _CHUNK)
        yield np.arange(start, end)
        start = end


class RoundRobin(_Stateless):
    """Runs a task whenever a counter, starting at 0, is a multiple of the task's interval; several run in turn.

    intervals: of the tasks that run.
    """

    def __init__(self, intervals: Mapping[str, int], *, names: tuple[str, ...]):
        super().__init__(tuple(names))
        self._index = np.array([self.names.index(n) for n in intervals])
        values = np.array(list(intervals.values()), np.int64)
        # Divided by their common factor: at other values of the counter nothing would run.
        self._intervals = values // np.gcd.reduce(values)

    def _num_runs(self, counter: int) -> np.ndarray:
        """(running tasks,): the number of times each ran before the counter had this value."""
        return -(-counter // self._intervals)

    def _counter(self, step: int) -> int:
        """The counter's value at a step: the largest with at most ``step`` steps before it."""
        low, high = 0, (step + 1) * int(self._intervals.min())
        while low < high:
            middle = (low + high + 1) // 2
            if self._num_runs(middle).sum() <= step:
                low = middle
            else:
                high = middle - 1
        return low

    def tasks(self, start: int, stop: int) -> np.ndarray:
        """See ``Sampler.tasks``."""
        parts = [self._tasks(int(steps[0]), int(steps[-1]) + 1) for steps in _chunks(start, stop)]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def _tasks(self, start: int, stop: int) -> np.ndarray:
        first, last = self._counter(start), self._counter(stop - 1)
        counters = np.arange(first, last + 1)
        _, tasks = np.nonzero(counters[:, None] % self._intervals[None, :] == 0)
        skip = start - int(self._num_runs(first).sum())
        return self._index[tasks][skip : skip + stop - start]

    def expected(self, start: int, stop: int) -> np.ndarray:
        """See ``Sampler.expected``."""
        total = np.zeros(len(self.names))
        for steps in _chunks(start, stop):
            total += np.bincount(self._tasks(int(steps[0]), int(steps[-1]) + 1), minlength=len(self.names))
        return total


class Exact(_Stateless):
    """Gives every task its share of each period, to the step, in permuted order.

    Shares become counts by the method of largest remainders. anchor: the step at which the first period starts.
    """

    def __init__(self, names: tuple[str, ...], shares: np.ndarray, *, seed: int, anchor: int, period: int):
        super().__init__(tuple(names))
        self._shares = np.asarray(shares)
        self._seed = seed
        self._anchor = anchor
        self._period = period
        self._edges = np.cumsum(apportion(self._shares, period))

    def tasks(self, start: int, stop: int) -> np.ndarray:
        """See ``Sampler.tasks``."""
        periods, places = np.divmod(np.arange(start, stop) - self._anchor, self._period)
        key = order.mix(self._seed, order.SALT_EXACT, periods.astype(np.uint64))
        slots = order.permute(places, size=self._period, key=key)
        return np.searchsorted(self._edges, slots, side="right").astype(np.int64)

    def expected(self, start: int, stop: int) -> np.ndarray:
        """See ``Sampler.expected``."""
        return self._shares * (stop - start)

    def state(self) -> dict:
        """See ``Sampler.state``."""
        shares = dict(zip(self.names, self._shares.tolist(), strict=True))
        return {"kind": "exact", "anchor": self._anchor, "period": self._period, "shares": shares}


def apportion(shares: np.ndarray, total: int) -> np.ndarray:
    """Rounds shares to whole numbers that sum to ``total``, by the method of largest remainders."""
    counts = np.floor(shares * total + 1e-9).astype(np.int64)
    remainders = np.where(shares > 0, shares * total - counts, -1.0)
    # Stable sort: ties are broken by position, so that the result is the same everywhere.
    counts[np.argsort(-remainders, kind="stable")[: total - int(counts.sum())]] += 1
    return counts
