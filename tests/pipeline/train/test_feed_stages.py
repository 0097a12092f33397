"""The stages of making a batch, by a clock that stands still but for what each stage takes."""

import types

import numpy as np
import pytest

from pipeline.data.plan import Arrival, Row
from pipeline.train.feed import STAGES, Feed
from pipeline.train.reject_limit import Draws
from pipeline.train.step_gate import StepGate


class Clock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


class OneBatch:
    """A schedule of one step, and its queue: ``next`` takes 5 s. decoded, here: seconds after it was asked."""

    steps, tasks = range(1), {"t": types.SimpleNamespace(data_set="set")}

    def __init__(self, clock: Clock, decoded: float, here: float):
        self.clock, self.times = clock, Arrival(clock.now + decoded, clock.now + here)

    def wait(self, step, *, timeout_s):
        return True

    def __getitem__(self, step):
        return types.SimpleNamespace(task="t", batch=0, variant=types.SimpleNamespace(name="v"), structure=None)

    def next(self) -> Row:
        self.clock.now += 5
        return Row("t", 0, 0, "v", ["a"], [], {"vision/tokens": np.zeros(2)})

    def arrival(self) -> Arrival:
        return self.times

    def close(self):
        """Nothing to end."""

    def join(self, timeout_s):
        return True


@pytest.mark.parametrize(
    ("decoded", "here", "expected"),
    [
        (2.0, 4.5, {"decode": 2.0, "transfer": 2.5, "batch": 0.5}),
        (4.0, 4.0, {"decode": 4.0, "transfer": 0.0, "batch": 1.0}),
        # Decoded before it was wanted; also here before.
        (-9.0, 5.0, {"decode": 0.0, "transfer": 5.0, "batch": 0.0}),
        (-9.0, -8.0, {"decode": 0.0, "transfer": 0.0, "batch": 5.0}),
        # A clock that is ahead takes nothing from the stages after it.
        (50.0, 60.0, {"decode": 5.0, "transfer": 0.0, "batch": 0.0}),
    ],
)
def test_what_a_batch_was_waited_for(monkeypatch, decoded, here, expected):
    clock = Clock()
    monkeypatch.setattr("pipeline.train.feed.time", clock)
    monkeypatch.setattr("pipeline.train.feed.chance_of", lambda structure, ids: 1.0)

    def takes(seconds, result):
        clock.now += seconds
        return result

    batches = OneBatch(clock, decoded, here)
    journal = types.SimpleNamespace(record=lambda row, **_: takes(0.25, Draws("set", 1, 0)))
    feed = Feed(
        batches, {"t": batches}, to_devices=lambda arrays: takes(3, arrays), quarantine=journal, gate=StepGate()
    )
    batch = feed.next()
    feed.close()
    assert batch.made_s == pytest.approx({"sampler": 0, "journal": 0.25, "devices": 3} | expected)
    assert list(batch.made_s) == list(STAGES) and sum(batch.made_s.values()) == pytest.approx(8.25)
