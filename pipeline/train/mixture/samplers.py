"""Which task each step runs. All samplers but the bandit are pure functions of (seed, step); the bandit follows the
losses, with a declared lag, and keeps a state of a few numbers a task.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from pipeline.data import order
from pipeline.data.spec import TaskSpec
from pipeline.train.mixture.settings import BanditSettings, ShareSettings

# Steps whose probabilities are looked at together.
_CHUNK = 4096


@dataclasses.dataclass(frozen=True)
class Stage:
    """Weights from a step on: those named replace the tasks' own."""

    from_step: int
    weights: tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class SamplerSpec(BanditSettings, ShareSettings):
    """How tasks are drawn.

    The paper's rule is the kind "multinomial", the authors' release has "round_robin", PolyViT's weighted task sampling
    is "exact"; max_weight is T5's limit on the number of examples.
    intervals: (task, interval) of round_robin, 1 for tasks that are not named.
    period: steps of "exact"; None: those of the run when it starts.
    stages: weights over time, for "multinomial"; ramp: they change linearly from one stage to the next.
    """

    intervals: tuple[tuple[str, int], ...] = ()
    period: int | None = None
    stages: tuple[Stage, ...] = ()
    ramp: bool = False

    def weights(self, tasks: Mapping[str, TaskSpec], num_rows: Mapping[str, int]) -> dict[str, float]:
        """Task → weight before any sharing out: its own, or its data set's number of examples."""
        out = {}
        for name, task in tasks.items():
            weight = float(num_rows[task.data_set] if task.weight is None else task.weight)
            weight = min(weight, self.max_weight or math.inf)
            out[name] = weight * (len(task.variants) if self.variant_weight == "full" else 1)
        return out

    def runs(self, tasks: Mapping[str, TaskSpec]) -> set[str]:
        """The tasks that a step of some stage may run."""
        staged = {name for stage in self.stages for name, weight in stage.weights if weight > 0}
        return {name for name, task in tasks.items() if task.weight != 0 or name in staged}

    def shares(self, weights: np.ndarray) -> np.ndarray:
        """(.., tasks) weights → their shares of the steps, which sum to 1."""
        weights = np.asarray(weights, np.float64)
        if self.kind == "uniform":
            weights = (weights > 0).astype(np.float64)
        # Scaled first: the largest weight to a high power must not overflow.
        weights = (weights / weights.max(-1, keepdims=True)) ** (1 / self.temperature) * (weights > 0)
        shares = weights / weights.sum(-1, keepdims=True)
        if self.max_share is None:
            return shares
        # Between two stages all steps have the same shares.
        rows, which = np.unique(shares.reshape(-1, shares.shape[-1]), axis=0, return_inverse=True)
        return np.array([_capped(row, self.max_share) for row in rows])[which.ravel()].reshape(shares.shape)

    def sampler(self, weights: Mapping[str, float], *, seed: int, position: Mapping, step: int, num_steps: int):
        """The sampler of a run that goes on at ``step``. position: what ``Sampler.state`` returned before."""
        names = tuple(weights)
        if position.get("kind") != self.kind:
            position = {}
        if self.kind == "round_robin":
            intervals = dict(self.intervals)
            return RoundRobin({n: intervals.get(n, 1) for n in names if weights[n] > 0}, names=names)
        if self.kind == "exact":
            shares = self.shares(list(weights.values()))
            same = position.get("shares") == dict(zip(names, shares.tolist(), strict=True))
            if same and self.period in (None, position["period"]):
                return Exact(names, shares, seed=seed, anchor=position["anchor"], period=position["period"])
            return Exact(names, shares, seed=seed, anchor=step, period=self.period or max(1, num_steps - step))
        if self.kind == "bandit":
            return Bandit(names, self.shares(list(weights.values())), seed=seed, spec=self, step=step, state=position)
        constant = None if self.stages else self.shares(list(weights.values()))

        def shares(steps: np.ndarray) -> np.ndarray:
            return self.shares(self.weights_at(steps, weights)) if constant is None else constant

        return Multinomial(names, shares, seed=seed)

    def weights_at(self, steps: np.ndarray, weights: Mapping[str, float]) -> np.ndarray:
        """(steps, tasks): the weights of every step."""
        columns = []
        for name, weight in weights.items():
            own = [(s.from_step, dict(s.weights)[name]) for s in self.stages if name in dict(s.weights)]
            own = own if own and own[0][0] == 0 else [(0, weight), *own]
            starts, values = np.asarray(own, np.float64).T
            if self.ramp:
                columns.append(np.interp(steps, starts, values))
            else:
                columns.append(values[np.searchsorted(starts, steps, side="right") - 1])
        return np.stack(columns, -1)


def _capped(shares: np.ndarray, most: float) -> np.ndarray:
    """Shares of which none is above ``most``, the others in their old proportion."""
    most = max(most, 1.0 / max(1, (shares > 0).sum()))
    capped = np.zeros(len(shares), bool)
    while True:
        free = ~capped
        left = 1.0 - most * capped.sum()
        total = shares[free].sum()
        out = np.where(capped, most, shares * (left / total if total else 0.0))
        over = free & (out > most * (1 + 1e-12))
        if not over.any():
            return out
        capped |= over


class Sampler(Protocol):
    """names: the tasks. known: steps below it can be asked for."""

    names: tuple[str, ...]
    known: float

    def tasks(self, start: int, stop: int) -> np.ndarray:
        """Task index of the steps start .. stop - 1 (steps counted from 0), int64."""
        ...

    def expected(self, start: int, stop: int) -> np.ndarray:
        """(tasks,): how many of these steps each task was to get."""
        ...

    def observe(self, step: int, task: str, loss: float) -> None:
        """The loss of a step, in order."""
        ...

    def state(self) -> dict:
        """What a resume needs beside the step, as JSON values."""
        ...


@dataclasses.dataclass
class _Stateless:
    names: tuple[str, ...]
    known: float = math.inf

    def observe(self, step: int, task: str, loss: float) -> None:
        pass

    def state(self) -> dict:
        return {}


class Multinomial(_Stateless):
    """One draw a step from a multinomial (paper section 3.1: p proportional to the number of examples of a task).

    shares: function of steps (n,) → probabilities, (n, tasks) or (tasks,) where they do not change.
    """

    def __init__(self, names: tuple[str, ...], shares, *, seed: int):
        super().__init__(tuple(names))
        self._shares, self._seed = shares, seed

    def tasks(self, start: int, stop: int) -> np.ndarray:
        parts = [order.tasks_at(self._seed, steps, probabilities=self._shares(steps)) for steps in _chunks(start, stop)]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def expected(self, start: int, stop: int) -> np.ndarray:
        shape = len(self.names)
        total = np.zeros(shape)
        for steps in _chunks(start, stop):
            total += np.broadcast_to(self._shares(steps), (len(steps), shape)).sum(0)
        return total


def _chunks(start: int, stop: int):
    """The steps in arrays that end at multiples of _CHUNK."""
    while start < stop:
        end = min(stop, (start // _CHUNK + 1) * _CHUNK)
        yield np.arange(start, end)
        start = end


class RoundRobin(_Stateless):
    """A counter from 0; at each of its values the tasks of whose interval it is a multiple run in turn.

    intervals: of the tasks that run.
    """

    def __init__(self, intervals: Mapping[str, int], *, names: tuple[str, ...]):
        super().__init__(tuple(names))
        self._index = np.array([self.names.index(n) for n in intervals])
        values = np.array(list(intervals.values()), np.int64)
        # A common factor only passes over values of the counter at which nothing runs.
        self._intervals = values // np.gcd.reduce(values)

    def _hits(self, counter: int) -> np.ndarray:
        """(running tasks,): how often each ran before the counter had this value."""
        return -(-counter // self._intervals)

    def _counter(self, step: int) -> int:
        """The counter's value at a step: the largest with at most ``step`` steps before it."""
        low, high = 0, (step + 1) * int(self._intervals.min())
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._hits(middle).sum() <= step else (low, middle - 1)
        return low

    def tasks(self, start: int, stop: int) -> np.ndarray:
        parts = [self._tasks(int(steps[0]), int(steps[-1]) + 1) for steps in _chunks(start, stop)]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def _tasks(self, start: int, stop: int) -> np.ndarray:
        first, last = self._counter(start), self._counter(stop - 1)
        counters = np.arange(first, last + 1)
        _, tasks = np.nonzero(counters[:, None] % self._intervals[None, :] == 0)
        skip = start - int(self._hits(first).sum())
        return self._index[tasks][skip : skip + stop - start]

    def expected(self, start: int, stop: int) -> np.ndarray:
        total = np.zeros(len(self.names))
        for steps in _chunks(start, stop):
            total += np.bincount(self._tasks(int(steps[0]), int(steps[-1]) + 1), minlength=len(self.names))
        return total


class Exact(_Stateless):
    """Every task gets its share of each period of steps, to the step, in an order that is a permutation.

    Shares become counts by the method of largest remainders. anchor: the step at which the first period starts.
    """

    def __init__(self, names: tuple[str, ...], shares: np.ndarray, *, seed: int, anchor: int, period: int):
        super().__init__(tuple(names))
        self._shares, self._seed, self._anchor, self._period = np.asarray(shares), seed, anchor, period
        self._edges = np.cumsum(apportion(self._shares, period))

    def tasks(self, start: int, stop: int) -> np.ndarray:
        periods, places = np.divmod(np.arange(start, stop) - self._anchor, self._period)
        key = order.mix(self._seed, order.SALT_EXACT, periods.astype(np.uint64))
        slots = order.permute(places, size=self._period, key=key)
        return np.searchsorted(self._edges, slots, side="right").astype(np.int64)

    def expected(self, start: int, stop: int) -> np.ndarray:
        return self._shares * (stop - start)

    def state(self) -> dict:
        shares = dict(zip(self.names, self._shares.tolist(), strict=True))
        return {"kind": "exact", "anchor": self._anchor, "period": self._period, "shares": shares}


def apportion(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in proportion to the shares that sum to ``total``: the method of largest remainders."""
    counts = np.floor(shares * total + 1e-9).astype(np.int64)
    remainders = np.where(shares > 0, shares * total - counts, -1.0)
    # Equal remainders go by place, so that the result is the same everywhere.
    counts[np.argsort(-remainders, kind="stable")[: total - int(counts.sum())]] += 1
    return counts


class Bandit:
    """Draws more of the tasks whose loss is still large against their first one: a Boltzmann bandit with a floor.

    Steps come in rounds of ``lag``. A task's value is its mean loss of a round over that of its first round, at most 1,
    smoothed over the rounds it ran in; 1 before it ran. The shares of round r are share x exp(gain x value), with a
    floor, and depend on the losses of the rounds up to r - 2 alone: a feed may draw a whole round ahead of the losses.
    Losses that are not finite say nothing.
    """

    _MEMORY = 0.7

    def __init__(self, names: tuple[str, ...], shares: np.ndarray, *, seed: int, spec: SamplerSpec, step: int, state):
        self.names, self._base, self._seed, self._spec = tuple(names), np.asarray(shares), seed, spec
        self._lag = spec.lag
        self._first = dict(state.get("first", {}))
        self._value = dict(state.get("value", {}))
        self._seen = {name: list(pair) for name, pair in state.get("seen", {}).items()}
        self._next = step
        # Round → shares. The rounds under way and the next one are kept.
        current = step // self._lag
        kept = {int(r): np.array([by.get(n, 0.0) for n in self.names]) for r, by in state.get("rounds", {}).items()}
        if state.get("drawn_by") != self._drawn_by():
            # Another mixture or other settings: what was drawn under the old ones no longer holds.
            kept = {}
        self._rounds = {r: kept.get(r, self._shares_now()) for r in (current, current + 1)}

    def _drawn_by(self) -> dict:
        """What the shares of a round depend on beside the losses."""
        base = dict(zip(self.names, self._base.tolist(), strict=True))
        return {"base": base, "lag": self._lag, "floor": self._spec.floor, "gain": self._spec.gain}

    @property
    def known(self) -> int:
        return (max(self._rounds) + 1) * self._lag

    def _shares_now(self) -> np.ndarray:
        values = np.array([self._value.get(name, 1.0) for name in self.names])
        weights = self._base * np.exp(self._spec.gain * values)
        running = self._base > 0
        floor = min(self._spec.floor, 1.0 / running.sum())
        return np.where(running, floor + (1 - floor * running.sum()) * weights / weights.sum(), 0.0)

    def tasks(self, start: int, stop: int) -> np.ndarray:
        steps = np.arange(start, stop)
        probabilities = np.stack([self._rounds[r] for r in (steps // self._lag).tolist()]) if len(steps) else None
        return order.tasks_at(self._seed, steps, probabilities=probabilities) if len(steps) else steps

    def expected(self, start: int, stop: int) -> np.ndarray:
        """Of rounds not known yet: as the last known one."""
        total, latest = np.zeros(len(self.names)), max(self._rounds)
        for r in range(start // self._lag, -(-stop // self._lag)):
            steps = min(stop, (r + 1) * self._lag) - max(start, r * self._lag)
            total += steps * self._rounds[min(max(r, min(self._rounds)), latest)]
        return total

    def observe(self, step: int, task: str, loss: float) -> None:
        if step != self._next:
            raise ValueError(f"the bandit expected the loss of step {self._next}, found step {step}")
        self._next += 1
        if math.isfinite(loss):
            seen = self._seen.setdefault(task, [0.0, 0])
            seen[0], seen[1] = seen[0] + float(loss), seen[1] + 1
        if self._next % self._lag == 0:
            self._close_round(self._next // self._lag - 1)

    def _close_round(self, r: int) -> None:
        for task, (total, count) in self._seen.items():
            mean = total / count
            first = self._first.setdefault(task, mean)
            value = min(1.0, max(0.0, mean / first)) if first > 0 else 0.0
            old = self._value.get(task, value)
            self._value[task] = self._MEMORY * old + (1 - self._MEMORY) * value
        self._seen = {}
        self._rounds[r + 2] = self._shares_now()
        self._rounds.pop(r - 1, None)

    def state(self) -> dict:
        return {
            "kind": "bandit",
            "drawn_by": self._drawn_by(),
            "first": self._first,
            "value": self._value,
            "seen": self._seen,
            "rounds": {
                str(r): dict(zip(self.names, shares.tolist(), strict=True))
                for r, shares in self._rounds.items()
                if r >= self._next // self._lag
            },
        }
