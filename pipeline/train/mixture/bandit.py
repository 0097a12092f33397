"""The adaptive sampler: it follows the losses, with a declared lag, and keeps a few numbers per task as its state."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from pipeline.data import order
from pipeline.train.mixture.settings import BanditSettings

# Weight of a task's old value when the loss of a round updates it.
_MEMORY = 0.7


class Bandit:
    """Draws tasks more often whose loss is still large relative to their first one: a Boltzmann bandit with a floor.

    Steps are grouped in rounds of ``lag``. A task's value is its mean loss of a round relative to that of its first
    round, at most 1, smoothed over the rounds in which it ran; 1 before it ran. The shares of round r are
    share x exp(gain x value), with a floor, and depend only on the losses up to round r - 2: a feed may draw a whole
    round ahead of the losses. Non-finite losses are ignored.
    """

    adaptive = True

    def __init__(
        self,
        names: tuple[str, ...],
        shares: np.ndarray,
        *,
        seed: int,
        settings: BanditSettings,
        step: int,
        state: Mapping,
    ):
        self.names = tuple(names)
        self._base = np.asarray(shares)
        self._seed = seed
        self._settings = settings
        self._lag = settings.lag
        self._next = step
        self._first = dict(state.get("first", {}))
        self._value = dict(state.get("value", {}))
        self._seen = {name: list(pair) for name, pair in state.get("seen", {}).items()}
        # Round → shares of the current round and the next one.
        current = step // self._lag
        kept = {int(r): np.array([by.get(n, 0.0) for n in self.names]) for r, by in state.get("rounds", {}).items()}
        if state.get("drawn_by") != self._drawn_by():
            # The mixture or the settings have changed: shares decided under the old ones are void.
            kept = {}
        self._rounds = {r: kept.get(r, self._shares_now()) for r in (current, current + 1)}

    def _drawn_by(self) -> dict:
        """Everything but the losses that the shares of a round depend on."""
        base = dict(zip(self.names, self._base.tolist(), strict=True))
        return {"base": base, "lag": self._lag, "floor": self._settings.floor, "gain": self._settings.gain}

    @property
    def decided_until(self) -> int:
        """The end of the last round whose shares are decided."""
        return (max(self._rounds) + 1) * self._lag

    def _shares_now(self) -> np.ndarray:
        values = np.array([self._value.get(name, 1.0) for name in self.names])
        weights = self._base * np.exp(self._settings.gain * values)
        running = self._base > 0
        floor = min(self._settings.floor, 1.0 / running.sum())
        return np.where(running, floor + (1 - floor * running.sum()) * weights / weights.sum(), 0.0)

    def tasks(self, start: int, stop: int) -> np.ndarray:
        """See ``Sampler.tasks``."""
        steps = np.arange(start, stop)
        if not len(steps):
            return steps
        probabilities = np.stack([self._rounds[r] for r in (steps // self._lag).tolist()])
        return order.tasks_at(self._seed, steps, probabilities=probabilities)

    def expected(self, start: int, stop: int) -> np.ndarray:
        """See ``Sampler.expected``; undecided rounds count as the last decided one."""
        total = np.zeros(len(self.names))
        first, last = min(self._rounds), max(self._rounds)
        for r in range(start // self._lag, -(-stop // self._lag)):
            steps = min(stop, (r + 1) * self._lag) - max(start, r * self._lag)
            total += steps * self._rounds[min(max(r, first), last)]
        return total

    def observe(self, step: int, task: str, loss: float) -> None:
        """See ``Sampler.observe``; the last loss of a round decides the round after the next."""
        if step != self._next:
            raise ValueError(f"the bandit expected the loss of step {self._next}, found step {step}")
        self._next += 1
        if math.isfinite(loss):
            seen = self._seen.setdefault(task, [0.0, 0])
            seen[0] += float(loss)
            seen[1] += 1
        if self._next % self._lag == 0:
            self._close_round(self._next // self._lag - 1)

    def _close_round(self, r: int) -> None:
        for task, (total, count) in self._seen.items():
            mean = total / count
            first = self._first.setdefault(task, mean)
            value = min(1.0, max(0.0, mean / first)) if first > 0 else 0.0
            old = self._value.get(task, value)
            self._value[task] = _MEMORY * old + (1 - _MEMORY) * value
        self._seen = {}
        self._rounds[r + 2] = self._shares_now()
        self._rounds.pop(r - 1, None)

    def state(self) -> dict:
        """See ``Sampler.state``."""
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
