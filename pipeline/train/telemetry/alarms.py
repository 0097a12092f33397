"""Alarms worth a person's attention. Each is one line, raised once and re-armed when its condition clears.

They read the records of metrics.jsonl one after the other and know neither files nor devices.
"""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Mapping

import numpy as np

from pipeline.errors import some_of
from pipeline.train.chance import is_guess
from pipeline.train.telemetry.expert_loads import ExpertLoads

# An expert is dead below this part of an even share of the router's probability, and alive again above twice that.
_DEAD_SHARE = 0.02
# Minimum number of steps in the means by which experts are judged.
_DEAD_AFTER_STEPS = 50

# Window of a loss's running mean, in steps; no loss is judged before the first window is full.
_LOSS_STEPS = 20
# Window of the median gradient norm, in steps, and the minimum number of norms in it.
_NORM_STEPS = 64
_MIN_NORMS = 20
# A gradient norm leaps if it is this many times the median.
_NORM_FACTOR = 100
# Steps at the full learning rate after which a task should be better than chance.
_CHANCE_STEPS = 100
# Consecutive finite updates after which the next non-finite one is reported again.
_FINITE_STEPS = 20

# Window of the share of time spent waiting for data, in steps, and the minimum number of steps in it.
_WAIT_STEPS = 64
_MIN_WAITS = 32
# First steps of a process, in which streams start and decoders warm up; their waits do not count.
_START_STEPS = 32
# Shares of the time: waiting above the first is an alarm, below the second re-arms it.
_WAIT_SHARE = 0.2
_REARM_SHARE = 0.1


class Alarms:
    """All alarms of a run.

    shared_encoder: all modalities use one encoder, else each has its own experts. feed_advice: task → advice if the run
    waits for its data (``feed_advice``).
    """

    def __init__(self, *, shared_encoder: bool, feed_advice: Mapping[str, str]):
        self._dead = DeadExperts(shared_encoder=shared_encoder)
        self._waits = DataWait(feed_advice)
        self._tasks: dict[str, tuple[Divergence, AtChance]] = {}

    def check(self, record: dict, loads: ExpertLoads) -> list[str]:
        """Returns the lines of one step. loads: this step included."""
        name = record["task"]
        of_task = self._tasks.setdefault(name, (Divergence(name), AtChance(name)))
        lines = [line for alarm in of_task for line in alarm.check(record)]
        return lines + self._dead.check(loads) + self._waits.check(record)


class DeadExperts:
    """Experts to which no router gives probability, whatever the task, variant or modality."""

    def __init__(self, *, shared_encoder: bool):
        self._shared = shared_encoder
        self._dead: set[tuple[str, int, int]] = set()

    def check(self, loads: ExpertLoads) -> list[str]:
        """Returns one line if experts have died since the last call."""
        weak = {
            (encoder, int(layer), int(expert)): share[layer, expert]
            for encoder, share in self._best_shares(loads).items()
            for layer, expert in np.argwhere(share < 2 * _DEAD_SHARE)
        }
        dead = {place for place, share in weak.items() if share < _DEAD_SHARE}
        new = sorted(dead - self._dead)
        self._dead = dead | (self._dead & weak.keys())
        if not new:
            return []
        names = [f"expert {expert} of {encoder} layer {layer}" for encoder, layer, expert in new]
        return [
            f"dead experts: {len(new)}, each with less than {_DEAD_SHARE:.0%} of an even share of the router's "
            f"probability in every task: {some_of(names)}; raise model.moe.load_balance_weight, or lower num_experts"
        ]

    def _best_shares(self, loads: ExpertLoads) -> dict[str, np.ndarray]:
        """Encoder → load of each expert (L, E) in the task that uses it most, 1 = an even share; no young means."""
        best: dict[str, np.ndarray] = {}
        steps: collections.Counter = collections.Counter()
        for modality, entry in loads.entries():
            encoder = "expert" if self._shared else f"{modality}'s expert"
            load = np.asarray(entry["expert_load"])
            share = load * load.shape[-1]
            best[encoder] = np.maximum(best[encoder], share) if encoder in best else share
            steps[encoder, modality] += entry["steps"]
        # A step with two modalities counts once.
        seen = {encoder: max(n for (e, _), n in steps.items() if e == encoder) for encoder in best}
        return {encoder: share for encoder, share in best.items() if seen[encoder] >= _DEAD_AFTER_STEPS}


class Divergence:
    """One task diverges: its loss climbs, its updates are not finite, or its gradient norm leaps."""

    def __init__(self, task: str):
        self._task = task
        self._steps = 0
        self._loss = 0.0
        self._lowest = math.inf
        self._climbed = False
        self._norms: collections.deque = collections.deque(maxlen=_NORM_STEPS)
        self._leapt = False
        self._finite_steps = _FINITE_STEPS

    def check(self, record: dict) -> list[str]:
        """Returns the lines of one step of the task."""
        if not record.get("finite", True):
            isolated = self._finite_steps >= _FINITE_STEPS
            self._finite_steps = 0
            return [f"{self._task}: an update was not finite and was skipped"] if isolated else []
        self._finite_steps += 1
        found = [self._check_loss(record["loss"]), self._check_norm(record.get("grad_norm", 0.0))]
        return [f"{self._task}: {text}" for text in found if text]

    def _check_loss(self, loss: float) -> str:
        self._steps += 1
        self._loss += max(1 / self._steps, 1 / _LOSS_STEPS) * (loss - self._loss)
        if self._steps < _LOSS_STEPS:
            return ""
        self._lowest = min(self._lowest, self._loss)
        limit = 2 * self._lowest + 0.5
        if self._climbed or self._loss <= limit:
            # Hysteresis: re-arm only half way back, so that the alarm does not flap at the limit.
            self._climbed = self._climbed and self._loss > (self._lowest + limit) / 2
            return ""
        self._climbed = True
        return (
            f"diverges: its loss is {self._loss:.3g} after {self._lowest:.3g} (running means); "
            "lower train.learning_rate or look at the task's data"
        )

    def _check_norm(self, norm: float) -> str:
        usual = statistics.median(self._norms) if len(self._norms) >= _MIN_NORMS else math.inf
        self._norms.append(norm)
        leapt_before = self._leapt
        self._leapt = norm > _NORM_FACTOR * usual
        return f"gradient norm {norm:.3g}, usually {usual:.3g}" if self._leapt and not leapt_before else ""


class AtChance:
    """The loss of one task is still what guessing would give after many steps at the full learning rate."""

    def __init__(self, task: str):
        self._task = task
        self._peak_rate = 0.0
        self._steps = 0
        self._raised = False
        # (loss, loss of guessing) of the last steps.
        self._recent: collections.deque = collections.deque(maxlen=_LOSS_STEPS)

    def check(self, record: dict) -> list[str]:
        """Returns one line once in a run, at the first step at which the task counts as stuck at chance."""
        if not record.get("finite", True) or "chance" not in record:
            return []
        rate = record.get("learning_rate", 0.0)
        if rate > self._peak_rate:
            # Still warming up.
            self._peak_rate = rate
        else:
            self._steps += 1
        self._recent.append((record["loss"] - record.get("losses", {}).get("router", 0.0), record["chance"]))
        loss, chance = np.mean(self._recent, axis=0).tolist()
        if self._raised or self._steps < _CHANCE_STEPS or not is_guess(loss, chance):
            return []
        self._raised = True
        return [self._line(loss, chance, contrasts=bool(record.get("temperatures")))]

    def _line(self, loss: float, chance: float, *, contrasts: bool) -> str:
        advice = "lower model.temperature_init, or " if contrasts else ""
        return (
            f"{self._task}: its loss of {loss:.4g} is still at chance ({chance:.4g}: nothing learned) after "
            f"{self._steps} steps at the full learning rate; {advice}raise train.learning_rate or batch_size, and "
            f"check that the rows' media and {'texts' if contrasts else 'labels'} belong together"
        )


class DataWait:
    """The run spends a large share of its time waiting for data."""

    def __init__(self, feed_advice: Mapping[str, str]):
        self._advice = feed_advice
        self._steps = 0
        self._raised = False
        # (task, seconds waiting for data, seconds in all); compiling does not count.
        self._recent: collections.deque = collections.deque(maxlen=_WAIT_STEPS)

    def check(self, record: dict) -> list[str]:
        """Returns one line if the share of waiting has risen above its limit."""
        self._steps += 1
        if self._steps <= _START_STEPS:
            return []
        wait_s = record["data_wait_s"]
        self._recent.append((record["task"], wait_s, wait_s + record["step_s"]))
        share = sum(wait for _, wait, _ in self._recent) / max(sum(busy for *_, busy in self._recent), 1e-9)
        if self._raised or len(self._recent) < _MIN_WAITS or share <= _WAIT_SHARE:
            self._raised = self._raised and share >= _REARM_SHARE
            return []
        self._raised = True
        return [self._line(share)]

    def _line(self, share: float) -> str:
        waits: collections.Counter = collections.Counter()
        for task, wait, _ in self._recent:
            waits[task] += wait
        task = max(waits, key=waits.get)
        advice = f"; {self._advice[task]}" if task in self._advice else ""
        steps = len(self._recent)
        return (
            f"{share:.0%} of the time of the last {steps} steps was spent waiting for data, mostly for {task}{advice}"
        )
