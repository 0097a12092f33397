"""A run whose Ray has lost its head: it stops with its state saved, in one line, to be run again."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import types

import pytest

from pipeline.cluster import head_watch, ray_private, trainer
from pipeline.cluster.head_watch import HeadWatch
from pipeline.cluster.spec import Cluster
from pipeline.errors import DataError
from pipeline.train.reject_limit import Draws
from pipeline.train.step_coordinator import StepCoordinator
from pipeline.train.step_gate import NextAction


class Run:
    """A run that saves ``steps`` one after the other, once it is asked to stop."""

    def __init__(self, monkeypatch, *, steps):
        self.asked, self.ended, self.codes, self.said = threading.Event(), threading.Event(), [], []
        self._steps = steps
        monkeypatch.setattr(head_watch, "end_process", self._end)
        monkeypatch.setattr(head_watch, "say", self.said.append)
        monkeypatch.setattr(head_watch, "typed_command", lambda: "imp pretrain")

    def ask(self):
        self.asked.set()

    def open_checkpoints(self):
        if isinstance(step := self._steps[0], Exception):
            raise step
        self._steps = self._steps[1:] or self._steps
        return types.SimpleNamespace(latest_step=step)

    def _end(self, code):
        self.codes.append(code)
        self.ended.set()


@pytest.mark.parametrize(
    ("steps", "save_s", "expected"),
    [
        ([3, 3, 7], 60.0, "stopped as the head of Ray was lost, after step 7, state saved; go on with: imp pretrain"),
        ([3], 0.2, "stopped as the head of Ray was lost, the newest whole checkpoint is 3; go on with: imp pretrain"),
        (
            [None],
            0.2,
            "stopped as the head of Ray was lost, the newest whole checkpoint is none; go on with: imp pretrain",
        ),
    ],
)
def test_a_run_without_a_head_stops_with_its_state_saved(monkeypatch, steps, save_s, expected):
    run = Run(monkeypatch, steps=steps)
    monkeypatch.setattr(head_watch, "_EVERY_S", 0.01)
    monkeypatch.setattr(head_watch, "_SAVE_S", save_s)
    monkeypatch.setattr(ray_private, "head_answers", lambda: False)
    with HeadWatch(run, run, joined=False, last=lambda: 7):
        assert run.ended.wait(200)
    assert run.asked.is_set() and run.codes == [75] and run.said[-1] == expected


def test_storage_that_does_not_answer_is_no_reason_to_stay(monkeypatch):
    run = Run(monkeypatch, steps=[DataError("out of reach")])
    monkeypatch.setattr(head_watch, "_SAVE_S", 0.1)
    monkeypatch.setattr(head_watch, "_EVERY_S", 0.01)
    monkeypatch.setattr(ray_private, "head_answers", lambda: False)
    with HeadWatch(run, run, joined=False, last=lambda: None):
        assert run.ended.wait(200)
    assert "the newest whole checkpoint is none" in run.said[-1]


def test_the_head_of_a_joined_cluster_may_come_back(monkeypatch):
    run, looks = Run(monkeypatch, steps=[3]), []
    seen = threading.Event()

    def answers():
        looks.append(True)
        if len(looks) == 20:
            seen.set()
        return len(looks) % 3 == 0

    monkeypatch.setattr(head_watch, "_EVERY_S", 0.001)
    monkeypatch.setattr(ray_private, "head_answers", answers)
    with HeadWatch(run, run, joined=True, last=lambda: None):
        assert seen.wait(200)
    assert not run.asked.is_set() and run.codes == []


def test_a_head_answers_while_it_lives(monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    own = types.SimpleNamespace(all_processes={"gcs_server": [types.SimpleNamespace(process=process)]})
    monkeypatch.setattr(ray_private.ray._private.worker, "_global_node", own)
    assert ray_private.head_answers()
    os.kill(process.pid, signal.SIGKILL)
    # Ended, whether or not anyone has waited for it.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not ray_private.head_answers()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        joined = types.SimpleNamespace(all_processes={}, gcs_address=address)
        monkeypatch.setattr(ray_private.ray._private.worker, "_global_node", joined)
        assert ray_private.head_answers()
    assert not ray_private.head_answers()


def test_the_coordinator_knows_after_which_update_a_run_stops():
    async def steps():
        coordinator = StepCoordinator()
        epoch = await coordinator.begin(1, 4)
        assert await coordinator.step(epoch, 0, 4, Draws("pets", 4, 0)) == (True, True, ("pets", 4, 0))
        assert await coordinator.last() is None
        await coordinator.stop()
        # Step 4, counted from 0, is the fifth update.
        return await coordinator.last()

    assert asyncio.run(steps()) == 5


def test_a_driver_that_waits_for_a_batch_stops_before_its_step():
    asked = []
    stop = types.SimpleNamespace(is_set=lambda: bool(asked), defer=lambda: None)
    gate = trainer._LocalGate(stop, Cluster())
    assert gate.next_action(4) is NextAction.STEP and not gate.leaves() and gate.last is None
    asked.append(True)
    assert gate.leaves() and gate.last == 4
    # Its batch had come after all.
    assert gate.next_action(5) is NextAction.STOP and gate.last == 5
