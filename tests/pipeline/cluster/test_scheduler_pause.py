"""Streams' scheduling loops pause between their steps, and end when they are told to."""

import types

import pytest

from pipeline.cluster import scheduler_pause
from pipeline.cluster.scheduler_pause import ClusterSchedulerPause, SchedulerPause, StreamEnded, end_streams


def executor(*running: int):
    operators = [types.SimpleNamespace(num_active_tasks=lambda n=n: n) for n in running]
    return types.SimpleNamespace(_topology=operators)


def test_a_loop_pauses_longer_while_no_task_runs(monkeypatch):
    slept = []
    monkeypatch.setattr(scheduler_pause.time, "sleep", slept.append)
    SchedulerPause().on_execution_step(executor(0, 0))
    SchedulerPause().on_execution_step(executor(0, 2))
    ClusterSchedulerPause().on_execution_step(executor(0, 0))
    assert slept == [0.2, 0.02, 0.01]


def test_all_loops_of_the_process_end():
    started, other = SchedulerPause(), SchedulerPause()
    started.before_execution_starts(executor())
    end_streams()
    with pytest.raises(StreamEnded):
        started.on_execution_step(executor(0))
    # One whose loop never began here.
    assert not other.ended
