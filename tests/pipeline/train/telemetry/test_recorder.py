"""The records of a run step by step: lines, rates, alarms, expert loads, the profiler's window."""

import json
import os
import sys

import numpy as np
import pytest

from pipeline.train.telemetry import profiler, recorder, step_log, throughput
from pipeline.train.telemetry.recorder import Recorder
from pipeline.train.telemetry.spec import LoggingSpec
from pipeline.train.telemetry.throughput import Throughput

QUIET = LoggingSpec(progress="none")


def record(step: int, **fields) -> dict:
    defaults = {
        "task": "pets",
        "variant": "32x32",
        "loss": 1.5,
        "examples": 8,
        "tokens": 32,
        "step_s": 0.25,
        "data_wait_s": 0.125,
        "compile_wait_s": 0.125,
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "finite": True,
        "temperatures": {},
        "moe": {},
        "ids": [f"id-{step}"],
    }
    return {"step": step} | defaults | fields


def make(run_dir, spec=QUIET, *, rank=0, start_step=0, num_steps=100, shared_encoder=True) -> Recorder:
    return Recorder(
        spec,
        run_dir=run_dir,
        rank=rank,
        steps=range(start_step, num_steps),
        flops={("pets", "32x32"): 10**9},
        shared_encoder=shared_encoder,
    )


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_of_metrics(tmp_path):
    recorded = make(tmp_path)
    assert recorded.first_step_at is None
    given = record(1, task_steps=1, expected_steps=0.5)
    recorded.record(given)
    recorded.close()
    (line,) = lines(tmp_path / "metrics.jsonl")
    # 8 examples and 32 tokens in half a second; a CPU's peak is not known.
    assert (line["examples_per_s"], line["tokens_per_s"]) == (16.0, 64.0) and "mfu" not in line
    assert (line["task_steps"], line["expected_steps"]) == (1, 0.5)
    assert line["rss_bytes"] > 1e7 and line["wall_s"] >= 0
    kept = {key: value for key, value in given.items() if key != "ids"}
    assert {key: line[key] for key in kept} == kept
    assert "ids" in given and recorded.first_step_at is not None
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl"]


def test_utilisation_by_hand(monkeypatch):
    """10^9 FLOPs in half a second on four devices of 10^9 a second each."""
    flops = {("pets", "32x32"): 10**9}
    assert "mfu" not in Throughput(flops, peak_flops=None).rates(record(1))
    monkeypatch.setattr(throughput.jax, "device_count", lambda: 4)
    assert Throughput(flops, peak_flops=1e9).rates(record(1))["mfu"] == 0.5
    monkeypatch.setattr(throughput.devices, "peak_flops", lambda kind: 5e9)
    assert Throughput(flops, peak_flops=None).rates(record(1))["mfu"] == 0.1
    assert Throughput(flops, peak_flops=1e9).rates(record(1, step_s=0.0, data_wait_s=0.0, compile_wait_s=0.0)) == {}


def test_only_rank_0_keeps_more_than_samples(tmp_path):
    spec = LoggingSpec(progress="plain", log_samples=True, writers=("tensorboard",), profile_steps=(1, 2))
    other = make(tmp_path, spec, rank=3)
    other.record(record(1))
    other.sync()
    other.close()
    assert os.listdir(tmp_path) == ["samples-rank-3.jsonl"]
    assert lines(tmp_path / "samples-rank-3.jsonl") == [{"step": 1, "task": "pets", "ids": ["id-1"]}]


def test_a_resume_has_each_step_once(tmp_path):
    spec = LoggingSpec(progress="none", log_samples=True)
    for start, stop in ((0, 7), (5, 9)):
        recorded = make(tmp_path, spec, start_step=start)
        for step in range(start + 1, stop + 1):
            recorded.record(record(step))
        recorded.close()
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert [line["step"] for line in lines(tmp_path / name)] == list(range(1, 10))


def test_samples_of_ranks_that_left_are_cut_back(tmp_path):
    """Two processes got to step 3 and died; one goes on from step 1, and sees what rank 1 had seen after it."""
    spec = LoggingSpec(progress="none", log_samples=True)
    for rank in (0, 1):
        recorded = make(tmp_path, spec, rank=rank)
        for step in (1, 2, 3):
            recorded.record(record(step))
        recorded.close()
    make(tmp_path, spec, start_step=1).close()
    for name in ("samples.jsonl", "samples-rank-1.jsonl"):
        assert [line["step"] for line in lines(tmp_path / name)] == [1]


def test_sync_reaches_the_disk(tmp_path, monkeypatch):
    recorded, synced = make(tmp_path, LoggingSpec(progress="none", log_samples=True)), []
    recorded.record(record(1, moe=ROUTED))
    monkeypatch.setattr(step_log.os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    recorded.sync()
    assert [os.path.basename(path).split("json")[0].strip(".") for path in synced] == ["samples", "metrics", "experts"]
    assert (tmp_path / "experts.json").exists()
    recorded.close()


ROUTED = {
    "vision": {
        "expert_load": [[0.25, 0.75], [1.0, 0.0]],
        "expert_slots": [[0.5, 0.5], [0.5, 0.5]],
        "unrouted_fraction": [0.1, 0.3],
        "confidence": [0.5, 0.75],
    }
}


def test_metrics_have_means_over_layers_and_the_file_has_the_layers(tmp_path):
    recorded = make(tmp_path)
    for step in (1, 2):
        recorded.record(record(step, moe=ROUTED))
    recorded.close()
    line = lines(tmp_path / "metrics.jsonl")[1]
    expected = {"expert_load": [0.625, 0.375], "expert_slots": [0.5, 0.5]}
    assert line["moe"]["vision"] == expected | {"unrouted_fraction": 0.2, "confidence": 0.625}
    stored = json.loads((tmp_path / "experts.json").read_text())["pets"]["32x32"]["vision"]
    assert stored["steps"] == 2 and stored["expert_load"] == ROUTED["vision"]["expert_load"]
    # A resume goes on with the means, a new run does not.
    for start, steps in ((2, 3), (0, 1)):
        recorded = make(tmp_path, start_step=start)
        recorded.record(record(start + 1, moe=ROUTED))
        recorded.close()
        assert json.loads((tmp_path / "experts.json").read_text())["pets"]["32x32"]["vision"]["steps"] == steps


def test_alarms_are_printed_and_recorded(tmp_path, capsys):
    recorded = make(tmp_path)
    for step in range(1, 22):
        recorded.record(record(step, grad_norm=1.0 if step < 21 else 500.0))
    recorded.record(record(22, grad_norm=1.0, alarms=["compiled again"], finite=False))
    recorded.close()
    leap, bad = "pets: gradient norm 500, usually 1", "pets: an update was not finite and was skipped"
    found = [line.get("alarms") for line in lines(tmp_path / "metrics.jsonl")]
    assert found[:20] == [None] * 20 and found[20:] == [[leap], ["compiled again", bad]]
    shown = [line for line in capsys.readouterr().err.splitlines() if "alarm" in line]
    assert shown == [f"alarm at step 21: {leap}", "alarm at step 22: compiled again", f"alarm at step 22: {bad}"]


def test_a_failing_writer_stops_nothing(tmp_path, capsys, monkeypatch):
    class Fails:
        def __init__(self, place):
            raise OSError("no space")

    monkeypatch.setitem(recorder.open_writers.__globals__["WRITERS"], "tensorboard", (Fails, "sys", ""))
    recorded = make(tmp_path, LoggingSpec(progress="none", writers=("tensorboard",)))
    for step in range(1, 4):
        recorded.record(record(step))
    recorded.close()
    assert len(lines(tmp_path / "metrics.jsonl")) == 3
    assert "tensorboard failed: OSError: no space" in capsys.readouterr().err


# --- the profiler's window ---


@pytest.fixture
def traces(monkeypatch):
    events = []
    monkeypatch.setattr(profiler.jax.profiler, "start_trace", lambda folder: events.append("start"))
    monkeypatch.setattr(profiler.jax.profiler, "stop_trace", lambda: events.append("stop"))
    return events


@pytest.mark.parametrize(
    ("window", "start_step", "expected"),
    [
        # The record of step n comes while step n + 1 runs: step 10 starts after the record of step 8.
        ((10, 12), 0, {8: "start", 12: "stop"}),
        ((1, 3), 0, {0: "start", 3: "stop"}),
        ((2, 2), 0, {0: "start", 2: "stop"}),
        ((3, 3), 0, {1: "start", 3: "stop"}),
        ((10, 12), 11, {11: "start", 12: "stop"}),
        ((10, 12), 12, {}),
        ((15, 99), 0, {13: "start", 40: "stop"}),  # the run ends inside the window
    ],
)
def test_the_window_holds_its_steps(tmp_path, traces, capsys, window, start_step, expected):
    profile = profiler.ProfilerWindow(window, run_dir=tmp_path, start_step=start_step)
    found = {start_step: traces.pop()} if traces else {}
    for step in range(start_step + 1, 41):
        profile.reached(step)
        found |= {step: traces.pop()} if traces else {}
    profile.close()
    found |= {40: traces.pop()} if traces else {}
    assert found == expected
    said = f"profile of steps {window[0]} to {window[1]}: {tmp_path / 'profile'}\n" if expected else ""
    assert capsys.readouterr().err == said


def test_a_real_trace(tmp_path):
    recorded = make(tmp_path, LoggingSpec(progress="none", profile_steps=(2, 90)))
    np.asarray(recorder.jax.numpy.ones(3) + 1)
    recorded.record(record(1))
    recorded.close()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert sys.stderr is not None
