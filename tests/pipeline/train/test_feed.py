"""The feed tells the gate of a batch, and then hands it to the loop."""

import threading
import types

import numpy as np
import pytest

from model.structure import InputShape, Structure
from pipeline.data.plan import Arrival, Row
from pipeline.train.feed import Feed
from pipeline.train.reject_limit import Draws
from pipeline.train.step_gate import StepGate

STRUCTURE = Structure((("nce", 1.0),), 2, (InputShape("vision", 4, 768, 3), InputShape("text", 8, 0, 1)))


class Gate(StepGate):
    """Notes the steps whose batch it was told of."""

    def __init__(self):
        super().__init__()
        self.told = []

    def ready(self, step, draws):
        self.told.append(step)


class Queue:
    """Batches of one task without end."""

    batch = -1

    def next(self):
        self.batch += 1
        return Row("pets", self.batch, 0, "all", ["a", "b"], [], {"vision/tokens": np.zeros((2, 1, 4), np.uint8)})

    def arrival(self):
        return Arrival(0.0, 0.0)

    def awaits(self):
        return "nothing"

    def close(self):
        pass

    def join(self, timeout_s):
        return True


class Steps:
    def __init__(self):
        self.steps = range(10)
        self.tasks = {"pets": types.SimpleNamespace(data_set="pets")}

    def wait(self, step, *, timeout_s):
        return True

    def __getitem__(self, step):
        variant = types.SimpleNamespace(name="all")
        return types.SimpleNamespace(task="pets", batch=step, variant=variant, structure=STRUCTURE)


@pytest.fixture
def make_feed(monkeypatch):
    monkeypatch.setattr("pipeline.train.feed.chance_of", lambda structure, ids: 1.0)
    made = []

    def make(gate, **options):
        journal = types.SimpleNamespace(record=lambda row, *, step, data_set: Draws(data_set, 2, 0, ()))
        made.append(Feed(Steps(), {"pets": Queue()}, to_devices=dict, quarantine=journal, gate=gate, **options))
        return made[-1]

    yield make
    for feed in made:
        feed.close()


def test_a_gate_that_grants_compiled_steps_is_told_once_the_step_is_compiled(make_feed):
    gate, compiled, asked = Gate(), threading.Event(), threading.Event()

    def await_graph(structure, leave):
        assert structure is STRUCTURE
        asked.set()
        compiled.wait(200)

    feed = make_feed(gate, await_graph=await_graph)
    assert asked.wait(200)
    assert gate.told == [] and feed.next(wait=False) is None
    compiled.set()
    batch = feed.next()
    assert (batch.step, gate.told[0]) == (0, 0) and batch.graph_s > 0


def test_a_feed_that_is_closed_waits_for_no_graph(make_feed):
    gate, asked = Gate(), threading.Event()

    def await_graph(structure, leave):
        asked.set()
        while not leave():
            pass

    feed = make_feed(gate, await_graph=await_graph)
    assert asked.wait(200)
    feed.close()
    # Which waits for a few seconds.
    feed._thread.join(200)
    assert not feed._thread.is_alive()


def test_another_gate_is_told_at_once(make_feed):
    gate = Gate()
    assert make_feed(gate).next().graph_s == 0.0
    assert gate.told[0] == 0
