"""metrics.jsonl as series: what a reader of mappings would find, in memory that does not grow with the run."""

import math
import tracemalloc

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.report import metrics_file
from pipeline.report.metrics_file import Loads, Metrics, Series, read_lines

ODD = st.none() | st.booleans() | st.text(max_size=2) | st.lists(st.integers(), max_size=2)
NUMBERS = st.integers(-5, 5) | st.floats() | ODD
ROUTING = st.fixed_dictionaries({}, optional={"unrouted_fraction": NUMBERS})
ROWS = st.fixed_dictionaries(
    {"step": st.integers(0, 9) | ODD, "task": st.sampled_from("ab") | st.none()},
    optional={
        "loss": NUMBERS,
        "chance": NUMBERS,
        "variant": st.sampled_from(["s", "l"]),
        "temperatures": st.dictionaries(st.sampled_from("xy"), NUMBERS) | NUMBERS,
        "moe": st.dictionaries(st.sampled_from("xy"), ROUTING) | NUMBERS,
        "alarms": st.lists(st.text(max_size=2), max_size=2) | NUMBERS,
    },
)


def plain(value: object) -> float:
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else math.nan


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(ROWS, max_size=12))
def test_series_hold_what_the_lines_hold_in_order_of_the_steps(rows):
    metrics = Metrics(rows)
    whole = [r for r in rows if not math.isnan(plain(r["step"])) and isinstance(r["task"], str)]
    assert len(metrics) == len(whole) and metrics.last_step == max((r["step"] for r in whole), default=0)
    whole.sort(key=lambda r: r["step"])
    for task in ("a", "b"):
        mine = [r for r in whole if r["task"] == task]
        assert metrics.tasks[task] == len(mine)
        losses = metrics.series("loss", task=task)
        # A line without a loss has lost it.
        expected = [plain(r.get("loss")) for r in mine]
        np.testing.assert_equal(losses.values, expected)
        np.testing.assert_equal(losses.steps, [float(r["step"]) for r in mine])
        assert losses.lost == sum(map(math.isnan, expected)) and losses.count == len(mine)
        of_variant = [plain(r.get("loss")) for r in mine if r.get("variant") == "s"]
        np.testing.assert_equal(metrics.series("loss", task=task, variant="s").values, of_variant)
    inner = [r["temperatures"] for r in whole if isinstance(r.get("temperatures"), dict)]
    found = metrics.series("temperatures", "x").values
    np.testing.assert_equal(found, [plain(values["x"]) for values in inner if "x" in values])
    moe = [r["moe"]["x"] for r in whole if isinstance(r.get("moe"), dict) and "x" in r["moe"]]
    found = metrics.series("moe", "x").values
    np.testing.assert_equal(found, [plain(v["unrouted_fraction"]) for v in moe if "unrouted_fraction" in v])
    alarms = [text for r in whole if isinstance(r.get("alarms"), list) for text in r["alarms"]]
    assert sorted(text for _, text in metrics.alarms) == sorted(map(str, alarms)) and metrics.num_alarms == len(alarms)


def test_a_long_series_keeps_sums_extremes_and_order():
    values = np.random.default_rng(0).normal(size=50_001)
    values[[7, 40_000]] = math.nan
    series = Series()
    for step, value in enumerate(values):
        series.add(step, value)
    assert len(series.values) <= metrics_file.MAX_BUCKETS and (np.diff(series.steps) > 0).all()
    assert series.count == 50_001 and series.lost == 2
    np.testing.assert_allclose(series.total, np.nansum(values))
    assert series.highest == np.nanmax(values) and series.range[0].min() == np.nanmin(values)
    # 64 steps a bucket: the smallest power of two that leaves 1,024 buckets.
    np.testing.assert_allclose(series.values[1], values[64:128].mean())


def test_memory_does_not_grow_with_the_steps():
    """A million lines took 310 MB. tracemalloc slows a line down tenfold: a series of few buckets shows it as well."""

    def peak(num_lines: int) -> int:
        load = [0.125] * 8
        rows = (
            {"step": s, "task": "a", "loss": 1 / (s + 1), "moe": {"vision": {"expert_load": load}}, "alarms": ["x"]}
            for s in range(num_lines)
        )
        tracemalloc.start()
        Metrics(rows)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    short = peak(3000)
    assert peak(12_000) < 1.2 * short < 2e6


def test_the_last_tenth_of_the_loads(monkeypatch):
    monkeypatch.setattr(metrics_file, "_MAX_LOADS", 32)
    loads = Loads()
    for step in range(3200):
        # An expert that is used only in the last tenth.
        loads.add([1.0, 1.0 if step >= 2880 else 0.0])
    np.testing.assert_allclose(loads.last_tenth(), [1.0, 1.0], atol=0.3)
    loads.add([1.0, 0.0, 2.0])
    np.testing.assert_allclose(loads.last_tenth(), [1.0, 0.0, 2.0])


def test_lines_that_are_none_are_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('\n[1]\n{"step": 1}\n{"step": 2, "task"')
    assert list(read_lines(tmp_path / "metrics.jsonl")) == [{}, {"step": 1}]
    assert list(read_lines(tmp_path / "absent.jsonl")) == []
