"""metrics.jsonl in columns: what a reader of mappings would find, in a small part of the memory."""

import json
import math
import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.report.metrics_file import Metrics, read_lines

ODD = st.none() | st.booleans() | st.text(max_size=2) | st.lists(st.integers(), max_size=2)
NUMBERS = st.integers(-5, 5) | st.floats() | ODD
ROUTING = st.fixed_dictionaries({}, optional={"unrouted_fraction": NUMBERS})
ROWS = st.fixed_dictionaries(
    {"step": st.integers(0, 9) | ODD, "task": st.sampled_from("ab") | st.none()},
    optional={
        "loss": NUMBERS,
        "chance": NUMBERS,
        "temperatures": st.dictionaries(st.sampled_from("xy"), NUMBERS) | NUMBERS,
        "moe": st.dictionaries(
            st.sampled_from("xy"), st.fixed_dictionaries({}, optional={"unrouted_fraction": NUMBERS})
        )
        | NUMBERS,
        "alarms": st.lists(st.text(max_size=2), max_size=2) | NUMBERS,
    },
)


def plain(value: object) -> float:
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else math.nan


@given(rows=st.lists(ROWS, max_size=12))
def test_columns_hold_what_the_lines_hold_in_order_of_the_steps(rows):
    metrics = Metrics(rows)
    whole = [r for r in rows if not math.isnan(plain(r["step"])) and isinstance(r["task"], str)]
    whole.sort(key=lambda r: r["step"])
    assert metrics.steps.tolist() == [r["step"] for r in whole]
    for task in ("a", "b", None):
        mine = [r for r in whole if task in (None, r["task"])]
        logged = [(r["step"], plain(r["loss"])) for r in mine if "loss" in r]
        np.testing.assert_equal(np.column_stack(metrics.values("loss", task=task)), np.array(logged).reshape(-1, 2))
        np.testing.assert_equal(metrics.all_values("chance", task=task), [plain(r.get("chance")) for r in mine])
        inner = [r["temperatures"] for r in mine if isinstance(r.get("temperatures"), dict)]
        found = metrics.values("temperatures", "x", task=task)[1]
        np.testing.assert_equal(found, [plain(values["x"]) for values in inner if "x" in values])
        moe = [r["moe"]["x"] for r in mine if isinstance(r.get("moe"), dict) and "x" in r["moe"]]
        found = metrics.values("moe", "x", "unrouted_fraction", task=task)[1]
        np.testing.assert_equal(found, [plain(v["unrouted_fraction"]) for v in moe if "unrouted_fraction" in v])
    assert metrics.num_lines("a") == sum(r["task"] == "a" for r in whole)
    alarms = [(r["step"], str(text)) for r in whole if isinstance(r.get("alarms"), list) for text in r["alarms"]]
    assert metrics.alarms == alarms and metrics.num_alarms == len(alarms)
    lost = ~np.isfinite(metrics.all_values("loss"))
    assert metrics.tasks_where(lost) == list(
        dict.fromkeys(r["task"] for r in whole if math.isnan(plain(r.get("loss"))))
    )


def test_a_line_takes_a_few_bytes_a_number(tmp_path):
    """At a million steps hundreds of megabytes; as mappings they took 7 kB a line."""
    load = [0.125] * 64
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in range(1, 4001):
            moe = {"vision": {"unrouted_fraction": 0.01, "expert_load": load, "expert_slots": load}}
            line = {"step": step, "task": f"task_{step % 20}", "loss": 1 / step, "grad_norm": 2.0, "moe": moe}
            file.write(json.dumps(line | {f"other_{n}": n / 7 for n in range(30)}) + "\n")
    tracemalloc.start()
    metrics = Metrics(row | {"moe": {}} for row in read_lines(tmp_path / "metrics.jsonl"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The step, its task, two numbers, the order while it is sorted.
    assert len(metrics) == 4000 and peak < 150 * 4000


def test_the_loads_that_are_kept_are_the_latest(monkeypatch):
    monkeypatch.setattr("pipeline.report.metrics_file._MAX_LOADS", 3)
    rows = ({"step": s, "task": "a", "moe": {"vision": {"expert_load": [s, 1]}}} for s in range(100))
    metrics = Metrics(rows)
    assert list(metrics.loads["vision"]) == [[97, 1], [98, 1], [99, 1]] and metrics.num_loads["vision"] == 100
