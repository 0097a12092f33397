"""Estimates of a run's duration, by hand."""

import types

import pytest

from pipeline.train.forecast import Forecast, in_words, lines, measured_flops_per_s


def budget(task, variant, *, gflops, share):
    return types.SimpleNamespace(task=task, variant=variant, flops=gflops * 1e9, share=share)


@pytest.fixture(autouse=True)
def _plain_numbers(monkeypatch):
    monkeypatch.setattr("pipeline.train.forecast._EFFICIENCY", 0.5)
    monkeypatch.setattr("pipeline.train.forecast._STEP_S", 0.0)


BUDGET = [
    budget("a", "64", gflops=3, share=0.5),
    budget("a", "32", gflops=1, share=0.25),
    budget("b", "64", gflops=8, share=0.25),
]


def step(task, variant, seconds, *, wait_s=0.0):
    return {"task": task, "variant": variant, "step_s": seconds, "data_wait_s": wait_s}


def test_before_the_first_step_flops_and_the_rate_say_it():
    # 3.75 GFLOPs a step on average, at 2 GFLOP/s.
    assert Forecast(BUDGET, flops_per_s=4e9).step_s() == pytest.approx(3.75 / 2)
    assert Forecast(BUDGET).step_s() is None and Forecast().step_s() is None


def test_steps_that_have_run_correct_the_rate_of_the_others():
    forecast = Forecast(BUDGET, flops_per_s=4e9)
    forecast.add(step("a", "64", 100.0))
    assert forecast.step_s() == pytest.approx(3.75 / 2)
    # 3 GFLOPs took 3 s where 1.5 s were expected, the median of what was seen: all others take twice as long too.
    for seconds in (3.0, 2.5, 30.0):
        forecast.add(step("a", "64", seconds, wait_s=50.0))
    assert forecast.step_s() == pytest.approx(0.5 * 3 + 0.25 * 1 + 0.25 * 8)
    for seconds in (90.0, 5.0):
        forecast.add(step("b", "64", seconds))
    # b as measured; what is left, a/32, by 8 s where 5.5 s were expected.
    assert forecast.step_s() == pytest.approx(0.5 * 3 + 0.25 * 0.5 * 8 / 5.5 + 0.25 * 5)


def test_without_a_rate_what_was_seen_says_it():
    forecast = Forecast(BUDGET)
    forecast.add(step("a", "64", 2.0))
    forecast.add(step("b", "64", 5.0))
    assert forecast.step_s() == pytest.approx((0.5 * 2 + 0.25 * 5) / 0.75)
    seen = Forecast()
    for seconds, task in ((1.0, "a"), (1.0, "a"), (1.0, "a"), (1.0, "a"), (9.0, "b")):
        seen.add(step(task, "64", seconds))
    assert seen.step_s() == pytest.approx(3.0)


def test_waits_count_once_the_start_is_over():
    forecast = Forecast(BUDGET)
    for wait_s in [100.0] * 8 + [1.0, 3.0]:
        forecast.add(step("a", "64", 2.0, wait_s=wait_s))
    assert forecast.step_s() == pytest.approx(2.0 + 2.0)


def needing(size: float):
    return types.SimpleNamespace(total=lambda: int(size * 2**30))


def test_what_is_said(monkeypatch):
    monkeypatch.setattr("pipeline.train.devices.memory_limit", lambda: (23 << 30, "a device"))
    monkeypatch.setattr("pipeline.train.forecast.advice", lambda need, limit: "use less")
    forecast = Forecast(BUDGET, flops_per_s=3.75e9 / 10)
    (line,) = lines(forecast, needing(3.1), num_steps=10_000)
    said = "estimate: 20 s a step here, 56 h for 10,000 steps; about 3.1 GiB of the 23 GiB of a device: fits"
    assert line == said
    line, warning = lines(forecast, needing(24), num_steps=10)
    assert line.endswith("about 24 GiB of the 23 GiB of a device: may not fit")
    assert warning == "warning: a step needs about 24 GiB, a device has 23 GiB; use less"
    # 10,000 steps of 20 s are 55.6 h, on each of the devices.
    monkeypatch.setattr("pipeline.train.forecast.price_of", lambda kind: 3.6)
    monkeypatch.setattr("jax.device_count", lambda: 2)
    (line,) = lines(forecast, needing(3.1), num_steps=10_000)
    assert "56 h for 10,000 steps, $400 at list price; about" in line
    monkeypatch.setattr("pipeline.train.devices.memory_limit", lambda: (None, "a device"))
    (line,) = lines(forecast, needing(3.1), num_steps=100)
    assert line.endswith(", $4.00 at list price; about 3.1 GiB of memory")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "0.012 s"),
        (9.96, "10 s"),
        (119, "119 s"),
        (150, "2.5 min"),
        (7200, "2 h"),
        (200_000, "56 h"),
        (400_000, "4.6 days"),
    ],
)
def test_lengths_of_time(seconds, text):
    assert in_words(seconds) == text


def test_the_rate_is_measured_quickly():
    import time

    from model.config import from_variant

    began = time.process_time()
    assert 1e8 < measured_flops_per_s(from_variant("imp-tiny-moe", dtype="float32")) < 1e15
    assert time.process_time() - began < 20
