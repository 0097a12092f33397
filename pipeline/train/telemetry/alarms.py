"""What a person should hear of while a run goes on: each alarm is a line of text, given once until it has passed.

Fed with the records of metrics.jsonl, one after the other; knows neither files nor devices.
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
_DEAD_AFTER_STEPS = 50

# Steps that a loss's running mean is over; it says nothing before.
_LOSS_STEPS = 20
# Norms whose median the next one is compared with, and the fewest of them.
_NORM_STEPS, _FEWEST_NORMS = 64, 20
_NORM_FACTOR = 100
# Steps of a task after its warm-up, by which it should have left chance.
_CHANCE_STEPS = 100
# Finite updates after which one that is not finite is news again.
_FINITE_STEPS = 20

_WAIT_STEPS, _FEWEST_WAITS = 64, 32
# Streams start, and decoders warm up, in the first steps of a process.
_START_STEPS = 32
_WAIT_SHARE, _WAIT_OVER_SHARE = 0.2, 0.1


class Alarms:
    """All alarms of a run.

    shared_encoder: all modalities go through one encoder, else each has experts of its own. feed_advice: task → what to
    raise where the run waits for its data.
    """

    def __init__(self, *, shared_encoder: bool, feed_advice: Mapping[str, str]):
        self._dead, self._waits = DeadExperts(shared_encoder=shared_encoder), DataWait(feed_advice)
        self._tasks: dict[str, tuple[Divergence, AtChance]] = {}

    def check(self, record: dict, loads: ExpertLoads) -> list[str]:
        """The lines of one step. loads: with this step in them."""
        name = record["task"]
        of_task = self._tasks.setdefault(name, (Divergence(name), AtChance(name)))
        lines = [line for alarm in of_task for line in alarm.check(record)]
        return lines + self._dead.check(loads) + self._waits.check(record)


class DeadExperts:
    """Experts that no task, variant or modality's router likes."""

    def __init__(self, *, shared_encoder: bool):
        self._shared, self._dead = shared_encoder, set()

    def check(self, loads: ExpertLoads) -> list[str]:
        weak = {
            (encoder, int(layer), int(expert)): share[layer, expert]
            for encoder, share in self._best_shares(loads).items()
            for layer, expert in np.argwhere(share < 2 * _DEAD_SHARE)
        }
        dead = {place for place, share in weak.items() if share < _DEAD_SHARE}
        new, self._dead = sorted(dead - self._dead), dead | (self._dead & weak.keys())
        if not new:
            return []
        names = [f"expert {expert} of {encoder} layer {layer}" for encoder, layer, expert in new]
        return [
            f"dead experts: {len(new)} of which each gets less than {_DEAD_SHARE:.0%} of an even share of the router's "
            f"probability in every task: {some_of(names)}; raise model.moe.load_balance_weight, or lower num_experts"
        ]

    def _best_shares(self, loads: ExpertLoads) -> dict[str, np.ndarray]:
        """Encoder → the most that any task likes each expert (L, E), 1 = an even share; without what is too young."""
        best, steps = {}, collections.Counter()
        for modality, entry in loads.entries():
            encoder = "expert" if self._shared else f"{modality}'s expert"
            load = np.asarray(entry["expert_load"])
            share = load * load.shape[-1]
            best[encoder] = np.maximum(best[encoder], share) if encoder in best else share
            steps[encoder, modality] += entry["steps"]
        # A step of two modalities counts once.
        seen = {encoder: max(n for (e, _), n in steps.items() if e == encoder) for encoder in best}
        return {encoder: share for encoder, share in best.items() if seen[encoder] >= _DEAD_AFTER_STEPS}


class Divergence:
    """Of one task: its loss climbs from where it was, updates are not finite, or the gradient norm leaps."""

    def __init__(self, task: str):
        self._task = task
        self._steps, self._loss, self._lowest, self._climbed = 0, 0.0, math.inf, False
        self._norms: collections.deque = collections.deque(maxlen=_NORM_STEPS)
        self._leapt, self._finite_steps = False, _FINITE_STEPS

    def check(self, record: dict) -> list[str]:
        if not record.get("finite", True):
            first, self._finite_steps = self._finite_steps >= _FINITE_STEPS, 0
            return [f"{self._task}: an update was not finite and has been left out"] if first else []
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
            # Half way back is back: around the limit itself it would be news again and again.
            self._climbed = self._climbed and self._loss > (self._lowest + limit) / 2
            return ""
        self._climbed = True
        return (
            f"diverges: its loss is {self._loss:.3g} after {self._lowest:.3g} (running means); "
            "lower train.learning_rate or look at the task's data"
        )

    def _check_norm(self, norm: float) -> str:
        usual = statistics.median(self._norms) if len(self._norms) >= _FEWEST_NORMS else math.inf
        self._norms.append(norm)
        first, self._leapt = not self._leapt, norm > _NORM_FACTOR * usual
        return f"gradient norm {norm:.3g} where {usual:.3g} is usual" if self._leapt and first else ""


class AtChance:
    """Of one task: its loss stays where guessing would be, after steps enough at the full learning rate."""

    def __init__(self, task: str):
        self._task, self._peak_rate, self._steps, self._said = task, 0.0, 0, False
        # (loss, loss of guessing) of the last steps.
        self._recent: collections.deque = collections.deque(maxlen=_LOSS_STEPS)

    def check(self, record: dict) -> list[str]:
        if not record.get("finite", True) or "chance" not in record:
            return []
        rate = record.get("learning_rate", 0.0)
        warming_up, self._peak_rate = rate > self._peak_rate, max(rate, self._peak_rate)
        self._steps += not warming_up
        self._recent.append((record["loss"] - record.get("losses", {}).get("router", 0.0), record["chance"]))
        loss, chance = np.mean(self._recent, axis=0).tolist()
        if self._said or self._steps < _CHANCE_STEPS or not is_guess(loss, chance):
            return []
        self._said = True
        return [self._line(loss, chance, contrasts=bool(record.get("temperatures")))]

    def _line(self, loss: float, chance: float, *, contrasts: bool) -> str:
        helps = "lower model.temperature_init, or " * contrasts + "raise train.learning_rate or batch_size"
        return (
            f"{self._task}: its loss of {loss:.4g} is still at chance ({chance:.4g}: nothing learned) after "
            f"{self._steps} steps at the full learning rate; {helps}, and see whether the rows' media and "
            f"{'words' if contrasts else 'labels'} belong together"
        )


class DataWait:
    """The share of the last steps' time that went to waiting for data."""

    def __init__(self, feed_advice: Mapping[str, str]):
        self._advice, self._steps, self._waits = feed_advice, 0, False
        # (task, seconds waiting for data, seconds in all); compiling is not counted.
        self._recent: collections.deque = collections.deque(maxlen=_WAIT_STEPS)

    def check(self, record: dict) -> list[str]:
        self._steps += 1
        if self._steps <= _START_STEPS:
            return []
        wait_s = record["data_wait_s"]
        self._recent.append((record["task"], wait_s, wait_s + record["step_s"]))
        share = sum(wait for _, wait, _ in self._recent) / max(sum(busy for *_, busy in self._recent), 1e-9)
        if self._waits or len(self._recent) < _FEWEST_WAITS or share <= _WAIT_SHARE:
            self._waits = self._waits and share >= _WAIT_OVER_SHARE
            return []
        self._waits = True
        of_tasks = collections.Counter()
        for task, wait, _ in self._recent:
            of_tasks[task] += wait
        task = max(of_tasks, key=of_tasks.get)
        advice = f"; {self._advice[task]}" if task in self._advice else ""
        return [
            f"{share:.0%} of the last {len(self._recent)} steps' time went to waiting for data, most for {task}{advice}"
        ]
