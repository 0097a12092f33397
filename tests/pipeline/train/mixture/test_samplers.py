"""The task of each step: shares by hand, distributions against their expectation, the same from anywhere."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.spec import TaskSpec, Variant
from pipeline.train.mixture.bandit import Bandit
from pipeline.train.mixture.samplers import RoundRobin, apportion, make_sampler
from pipeline.train.mixture.settings import BanditSettings, Stage
from pipeline.train.mixture.spec import SamplerSpec

WEIGHTS = {"x": 3.0, "y": 1.0, "z": 4.0}
STEPS = 20_000


def make(weights=WEIGHTS, *, seed=0, position=(), step=0, num_steps=STEPS, **fields):
    spec = SamplerSpec(**fields)
    return make_sampler(spec, weights, seed=seed, position=dict(position), step=step, num_steps=num_steps)


def counts(sampler, start=0, stop=STEPS) -> list[int]:
    return np.bincount(sampler.tasks(start, stop), minlength=len(sampler.names)).tolist()


def assert_multinomial(found: list[int], shares: list[float]) -> None:
    """Every count within 4 standard deviations of its expectation."""
    total = sum(found)
    for count, share in zip(found, shares, strict=True):
        assert abs(count - total * share) <= 4 * math.sqrt(total * share * (1 - share)) + 1e-9, (found, shares)


# --- weights and shares ---


def task(name, *, weight=None, num_variants=1):
    variants = tuple(Variant(str(i), 8) for i in range(num_variants))
    return TaskSpec(name, "set", (("nce", 1.0),), ("image", "text"), variants, weight=weight)


def test_weights_are_the_tasks_own_or_the_number_of_examples():
    tasks = {"a": task("a"), "b": task("b", weight=50.0), "c": task("c", num_variants=3)}
    assert SamplerSpec().weights(tasks, {"set": 1000}) == {"a": 1000.0, "b": 50.0, "c": 1000.0}
    # In full to each variant, and no weight above 400 before that.
    assert SamplerSpec(variant_weight="full").weights(tasks, {"set": 1000}) == {"a": 1000.0, "b": 50.0, "c": 3000.0}
    assert SamplerSpec(max_weight=400.0).weights(tasks, {"set": 1000}) == {"a": 400.0, "b": 50.0, "c": 400.0}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [3 / 8, 1 / 8, 4 / 8]),
        ({"kind": "uniform"}, [1 / 3, 1 / 3, 1 / 3]),
        # Square roots: 1.732, 1, 2.
        ({"temperature": 2.0}, [0.3660, 0.2113, 0.4226]),
        ({"temperature": 0.5}, [9 / 26, 1 / 26, 16 / 26]),
        # z is cut to 0.4; what is over goes to x and y as 3 to 1.
        ({"max_share": 0.4}, [0.4, 0.2, 0.4]),
        ({"max_share": 0.45}, [0.4125, 0.1375, 0.45]),
    ],
)
def test_shares(fields, expected):
    np.testing.assert_allclose(SamplerSpec(**fields).shares([3.0, 1.0, 4.0]), expected, atol=5e-5)


def test_a_task_without_weight_is_never_drawn():
    for kind in ("multinomial", "uniform", "exact", "round_robin", "bandit"):
        sampler = make({"x": 1.0, "y": 0.0, "z": 2.0}, kind=kind, bandit=BanditSettings(lag=64))
        found = sampler.tasks(0, int(min(sampler.decided_until, 500)))
        assert 1 not in found and set(found) == {0, 2}, kind


# --- what all kinds share ---


@given(
    kind=st.sampled_from(["multinomial", "uniform", "round_robin", "exact"]),
    start=st.integers(0, 300),
    length=st.integers(0, 200),
    seed=st.integers(0, 1000),
    intervals=st.lists(st.integers(1, 12), min_size=3, max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_steps_are_the_same_from_anywhere(kind, start, length, seed, intervals):
    sampler = make(kind=kind, seed=seed, intervals=dict(zip("xyz", intervals, strict=True)), period=70)
    whole = sampler.tasks(0, start + length)
    assert sampler.tasks(start, start + length).tolist() == whole[start:].tolist()
    np.testing.assert_allclose(
        sampler.expected(0, start) + sampler.expected(start, start + length), sampler.expected(0, start + length)
    )
    assert sampler.expected(0, start + length).sum() == pytest.approx(start + length)


@pytest.mark.parametrize("kind", ["multinomial", "uniform", "exact", "bandit"])
def test_seeds_differ(kind):
    found = [make(kind=kind, seed=seed, bandit=BanditSettings(lag=64)).tasks(0, 60).tolist() for seed in range(3)]
    assert found[0] != found[1] and found[1] != found[2]


# --- multinomial ---


@pytest.mark.parametrize(
    ("fields", "shares"),
    [
        ({}, [0.375, 0.125, 0.5]),
        ({"kind": "uniform"}, [1 / 3] * 3),
        ({"temperature": 2.0}, [0.3660, 0.2113, 0.4226]),
        ({"max_share": 0.4}, [0.4, 0.2, 0.4]),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_draws_follow_the_shares(fields, shares, seed):
    assert_multinomial(counts(make(seed=seed, **fields)), shares)


def test_draws_do_not_depend_on_the_draws_before():
    """Of the steps after an x, y and z as many run as anywhere."""
    steps = make().tasks(0, STEPS)
    after = steps[1:][steps[:-1] == 0]
    assert_multinomial(np.bincount(after, minlength=3).tolist(), [0.375, 0.125, 0.5])


def test_stages_change_the_weights_at_their_steps():
    stages = (Stage(1000, {"x": 0.0, "y": 4.0}), Stage(3000, {"z": 0.0}))
    sampler = make(stages=stages)
    assert_multinomial(counts(sampler, 0, 1000), [0.375, 0.125, 0.5])
    assert_multinomial(counts(sampler, 1000, 3000), [0.0, 0.5, 0.5])
    assert counts(sampler, 3000, 3500) == [0, 500, 0]
    np.testing.assert_allclose(sampler.expected(900, 1100), [37.5, 12.5 + 50, 50 + 50])


def test_a_ramp_changes_them_by_a_straight_line():
    stages = (Stage(0, {"x": 1.0, "y": 0.0, "z": 0.0}), Stage(100, {"x": 0.0, "y": 1.0}))
    sampler = make(stages=stages, ramp=True)
    # At step 25: x 0.75, y 0.25.
    np.testing.assert_allclose(sampler.expected(25, 26), [0.75, 0.25, 0.0])
    np.testing.assert_allclose(sampler.expected(0, 100), [50.5, 49.5, 0.0])
    assert counts(sampler, 100, 400) == [0, 300, 0]


def test_a_task_that_only_a_stage_runs_is_one_that_runs():
    spec = SamplerSpec(stages=(Stage(10, {"b": 2.0}),))
    assert spec.runs({"a": task("a"), "b": task("b", weight=0.0), "c": task("c", weight=0.0)}) == {"a", "b"}


# --- round robin ---


def test_round_robin_by_hand():
    """Counter 0: a b c; 1: a; 2: a b; 3: a c; 4: a b; 5: a; 6: a b c."""
    sampler = RoundRobin({"a": 1, "b": 2, "c": 3}, names=("a", "b", "c"))
    assert "".join("abc"[i] for i in sampler.tasks(0, 14)) == "abcaabacabaabc"
    assert sampler.expected(0, 11).tolist() == [6.0, 3.0, 2.0]
    # Counters at which nothing runs are passed over: 0: both; 4: p; 6: q; 8: p; 12: both.
    sparse = RoundRobin({"p": 4, "q": 6}, names=("p", "q"))
    assert "".join("pq"[i] for i in sparse.tasks(0, 7)) == "pqpqppq"


def test_round_robin_of_the_release_keeps_its_proportions():
    """Intervals 1, 12, 5, 12, 8 (the release's examples): 120 counters hold 120 + 10 + 24 + 10 + 15 steps."""
    intervals = {"images": 1, "video_nce": 12, "video_classes": 5, "triplet": 12, "audio": 8}
    sampler = RoundRobin(intervals, names=tuple(intervals))
    for cycle in (0, 7):
        assert sampler.expected(179 * cycle, 179 * (cycle + 1)).tolist() == [120, 10, 24, 10, 15]


# --- exact ---


def test_apportioning_by_hand():
    """Of 10: 3.75, 1.25 and 5: the place that is left goes to the largest remainder."""
    assert apportion(np.array([0.375, 0.125, 0.5]), 10).tolist() == [4, 1, 5]
    assert apportion(np.array([1 / 3, 1 / 3, 1 / 3]), 10).tolist() == [4, 3, 3]
    assert apportion(np.array([0.5, 0.0, 0.5]), 3).tolist() == [2, 0, 1]


@given(seed=st.integers(0, 100), period=st.integers(1, 90), anchor=st.integers(0, 40))
@settings(max_examples=40, deadline=None)
def test_exact_shares_of_every_period(seed, period, anchor):
    sampler = make(kind="exact", seed=seed, period=period, step=anchor)
    expected = apportion(np.array([0.375, 0.125, 0.5]), period).tolist()
    for number in range(3):
        first = anchor + number * period
        assert counts(sampler, first, first + period) == expected


def test_exact_shares_of_a_run_and_of_its_extension():
    """Without a period the run is one; a run that takes more steps goes on in periods of the old length."""
    first = make(kind="exact", num_steps=80)
    assert counts(first, 0, 80) == [30, 10, 40]
    longer = make(kind="exact", num_steps=160, position=first.state(), step=80)
    assert longer.tasks(0, 80).tolist() == first.tasks(0, 80).tolist()
    assert counts(longer, 80, 160) == [30, 10, 40]
    # Another mixture starts its own period where it begins.
    other = make({"x": 1.0, "y": 1.0}, kind="exact", num_steps=160, position=first.state(), step=60)
    assert counts(other, 60, 160) == [50, 50]


def test_periods_are_permuted_differently():
    sampler = make(kind="exact", period=64)
    assert sampler.tasks(0, 64).tolist() != sampler.tasks(64, 128).tolist()


# --- the bandit ---


def drive(sampler: Bandit, losses, start: int, stop: int) -> list[int]:
    """Runs the steps with the losses that ``losses(task, step)`` says."""
    drawn = []
    for step in range(start, stop):
        index = int(sampler.tasks(step, step + 1)[0])
        drawn.append(index)
        sampler.observe(step, sampler.names[index], losses(sampler.names[index], step))
    return drawn


def falling(task_name, step):
    return {"x": 2.0, "y": 2.0, "z": 2.0 * 0.99**step}[task_name]


def test_the_bandit_draws_more_of_what_is_not_learned_yet():
    sampler = make({"x": 1.0, "y": 1.0, "z": 1.0}, kind="bandit", bandit=BanditSettings(lag=32))
    drawn = drive(sampler, falling, 0, 2048)
    assert_multinomial(np.bincount(drawn[:64], minlength=3).tolist(), [1 / 3] * 3)
    # z's loss is gone: its weight is e^0 against e^2 of the others, with a floor of 0.02 for each.
    weights = np.exp([2.0, 2.0, 0.0])
    expected = 0.02 + 0.94 * weights / weights.sum()
    np.testing.assert_allclose(sampler.expected(2048, 2049), expected, atol=1e-3)
    assert_multinomial(np.bincount(drawn[1536:], minlength=3).tolist(), expected.tolist())


def test_the_first_rounds_of_the_bandit_by_hand():
    """lag 2, one loss a task: round 0 and 1 by the weights, round 2 by the losses of round 0 alone."""
    settings = BanditSettings(lag=2, floor=0.0, gain=1.0)
    sampler = Bandit(("x", "y"), np.array([0.5, 0.5]), seed=0, settings=settings, step=0, state={})
    assert sampler.decided_until == 4
    sampler.observe(0, "x", 3.0)
    sampler.observe(1, "x", 1.0)
    assert sampler.decided_until == 6
    # x's first round sets its measure: value 1, as y's that never ran.
    np.testing.assert_allclose(sampler.expected(4, 6), [1.0, 1.0])
    sampler.observe(2, "x", 1.0)
    sampler.observe(3, "y", 5.0)
    # x: mean 1 over its first mean 2 is 0.5, smoothed 0.7 + 0.3 x 0.5 = 0.85; y: 1.
    share = math.exp(0.85) / (math.exp(0.85) + math.e)
    np.testing.assert_allclose(sampler.expected(6, 8), [2 * share, 2 * (1 - share)])


@pytest.mark.parametrize("stop", [1, 31, 32, 33, 100, 160])
def test_the_bandit_goes_on_from_its_state_as_if_it_had_never_stopped(stop):
    whole = make({"x": 1.0, "y": 2.0, "z": 1.0}, kind="bandit", seed=5)
    expected = drive(whole, falling, 0, 300)
    first = make({"x": 1.0, "y": 2.0, "z": 1.0}, kind="bandit", seed=5)
    drawn = drive(first, falling, 0, stop)
    state = json.loads(json.dumps(first.state()))
    second = make({"x": 1.0, "y": 2.0, "z": 1.0}, kind="bandit", seed=5, position=state, step=stop)
    assert second.decided_until == first.decided_until
    assert drawn + drive(second, falling, stop, 300) == expected
    assert second.state() == whole.state()


def test_losses_that_are_not_finite_say_nothing_to_the_bandit():
    sampler = make({"x": 1.0, "y": 1.0}, kind="bandit", bandit=BanditSettings(lag=8, floor=0.1))
    drive(sampler, lambda name, step: math.nan if name == "x" else 1.0, 0, 80)
    shares = sampler.expected(80, 81)
    assert shares.sum() == pytest.approx(1) and (shares > 0.1).all()


def test_the_bandit_takes_losses_in_order_alone():
    sampler = make(kind="bandit")
    with pytest.raises(ValueError, match="expected the loss of step 0, found step 3"):
        sampler.observe(3, "x", 1.0)


def test_a_task_that_joins_the_bandit_starts_with_the_value_of_what_never_ran():
    old = make({"x": 1.0, "y": 1.0}, kind="bandit", bandit=BanditSettings(lag=8))
    drive(old, lambda name, step: 0.9**step, 0, 80)
    new = make(
        {"x": 1.0, "y": 1.0, "z": 1.0}, kind="bandit", bandit=BanditSettings(lag=8), position=old.state(), step=80
    )
    shares = new.expected(80, 81)
    assert shares[2] > shares[0] and shares[2] > shares[1]


def test_other_settings_of_the_bandit_hold_from_the_resume_on():
    weights = {"x": 1.0, "y": 1.0}
    old = make(weights, kind="bandit", bandit=BanditSettings(lag=8))
    drive(old, lambda name, step: 1.0, 0, 20)
    stopped = make({"x": 1.0, "y": 0.0}, kind="bandit", bandit=BanditSettings(lag=8), position=old.state(), step=20)
    assert set(stopped.tasks(20, 32)) == {0}
    assert (
        make(weights, kind="bandit", bandit=BanditSettings(lag=16), position=old.state(), step=20).decided_until == 48
    )
    first = make(kind="exact", period=10)
    other = make(kind="exact", period=50, position=first.state(), step=20)
    assert counts(other, 20, 70) == apportion(np.array([0.375, 0.125, 0.5]), 50).tolist()


def test_round_robin_takes_the_memory_of_its_steps():
    """Intervals with a common factor: at most values of the counter nothing would run."""
    sampler = RoundRobin({"p": 1000, "q": 2000}, names=("p", "q"))
    assert "".join("pq"[i] for i in sampler.tasks(0, 6)) == "pqppqp"
    assert len(sampler.tasks(0, 200_000)) == 200_000


def test_capped_stages_of_a_long_run_take_seconds():
    spec = SamplerSpec(max_share=0.4, stages=(Stage(500_000, {"x": 9.0}),))
    sampler = make_sampler(spec, WEIGHTS, seed=0, position={}, step=0, num_steps=1_000_000)
    np.testing.assert_allclose(sampler.expected(0, 1_000_000), [4e5, 2e5, 4e5], rtol=0.3)
