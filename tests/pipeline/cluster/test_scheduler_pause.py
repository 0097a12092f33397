"""A stream's scheduling loop rests while nothing is decoded, and ends when it is told to."""

import types

import pytest

from pipeline.cluster import ray_input
from pipeline.cluster.scheduler_pause import SchedulerPause, StreamEnded


def test_a_loop_rests_while_no_task_runs_and_ends_with_its_source(monkeypatch):
    rested, running = [], [1]
    source = types.SimpleNamespace(ended=False, rest=rested.append)
    monkeypatch.setattr(ray_input, "source_of", lambda executor: source)
    executor = types.SimpleNamespace(_topology=[types.SimpleNamespace(num_active_tasks=lambda: running[0])])
    pause = SchedulerPause()
    pause.before_execution_starts(executor)
    pause.on_execution_step(executor)
    assert rested == []
    running[0] = 0
    pause.on_execution_step(executor)
    assert rested == [0.2]
    source.ended = True
    with pytest.raises(StreamEnded):
        pause.on_execution_step(executor)
