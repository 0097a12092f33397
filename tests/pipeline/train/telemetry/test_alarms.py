"""Alarms by hand: when each comes, that it comes once, and when it comes again."""

import math

import numpy as np

from pipeline.train.telemetry.alarms import Alarms, AtChance, DataWait, DeadExperts, Divergence
from pipeline.train.telemetry.expert_loads import ExpertLoads


def steps_with_news(check, records) -> list[int]:
    """The steps, counted from 1, at which ``check`` says something."""
    return [step for step, record in enumerate(records, 1) if check(record)]


# --- a loss that stays at chance ---


def guesses(losses, *, chance: float = math.log(16), rates=None, **fields) -> list[dict]:
    rates = [1e-3] * len(losses) if rates is None else rates
    return [{"loss": x, "chance": chance, "learning_rate": r} | fields for x, r in zip(losses, rates, strict=True)]


def test_a_loss_that_stays_at_chance_is_said_once():
    """2.771 after 2.773 has fallen, and nothing is learned. The first step is the warm-up."""
    alarm = AtChance("films")
    assert steps_with_news(alarm.check, guesses([2.773, *[2.771] * 300])) == [101]
    alarm = AtChance("films")
    (line,) = (line for record in guesses([2.771] * 101, temperatures={"a_b": 0.1}) for line in alarm.check(record))
    assert line == (
        "films: its loss of 2.771 is still at chance (2.773: nothing learned) after 100 steps at the full learning "
        "rate; lower model.temperature_init, or raise train.learning_rate or batch_size, and check that the rows' "
        "media and texts belong together"
    )


def test_what_is_no_guess_is_no_alarm():
    assert steps_with_news(AtChance("a").check, guesses(np.linspace(2.77, 2.6, 200))) == []
    # Steps while the rate still climbs do not count, nor does what the router adds.
    climbing = np.linspace(1e-6, 1e-3, 150)
    assert steps_with_news(AtChance("a").check, guesses([2.77] * 150, rates=climbing)) == []
    routed = [record | {"losses": {"router": 0.5}} for record in guesses([3.0] * 150)]
    assert steps_with_news(AtChance("a").check, routed) == []
    # A batch of one class has no chance to beat; a loss of variants is compared with the chance of each.
    assert steps_with_news(AtChance("a").check, guesses([0.0] * 150, chance=0.0)) == []
    mixed = [
        x for pair in zip(guesses([2.6] * 75), guesses([4.0] * 75, chance=math.log(64)), strict=True) for x in pair
    ]
    assert steps_with_news(AtChance("a").check, mixed) == []


# --- dead experts ---


def routed(loads: ExpertLoads, load, *, task="a", modality="vision", steps=1) -> None:
    load = np.asarray(load)
    for _ in range(steps):
        loads.add(task, "all", {modality: {"expert_load": load, "expert_slots": load, "unrouted_fraction": load[:, 0]}})


def test_an_expert_is_dead_when_no_task_likes_it():
    """Two layers of four experts: an even share is 1/4, so dead is below 0.005."""
    loads, alarm = ExpertLoads(), DeadExperts(shared_encoder=True)
    first = [[0.4, 0.3, 0.296, 0.004], [0.5, 0.5, 0.0, 0.0]]
    routed(loads, first, steps=49)
    assert alarm.check(loads) == []
    routed(loads, first)
    (line,) = alarm.check(loads)
    assert "dead experts: 3, each with less than 2%" in line
    assert "expert 3 of expert layer 0, expert 2 of expert layer 1, expert 3 of expert layer 1;" in line
    assert alarm.check(loads) == []
    # Another task likes the first of them well and the second a little: it lives, and so might the other.
    routed(loads, [[0.3, 0.3, 0.3, 0.1], [0.494, 0.5, 0.006, 0.0]], task="b", modality="text")
    assert alarm.check(loads) == [] and alarm._dead == {("expert", 1, 2), ("expert", 1, 3)}


def test_an_expert_that_recovered_can_die_again():
    alarm, found = DeadExperts(shared_encoder=True), []
    for load in (0.0, 0.006, 0.0, 0.02, 0.0):  # dead, hardly better, dead, alive (above 0.01), dead
        loads = ExpertLoads()
        routed(loads, [[0.5, 0.3, 0.2 - load, load]], steps=50)
        found.append(len(alarm.check(loads)))
    assert found == [1, 0, 0, 0, 1]


def test_towers_have_experts_of_their_own():
    """Load from text does not keep the experts of vision alive; audio has too few steps to judge."""
    loads, alarm = ExpertLoads(), DeadExperts(shared_encoder=False)
    routed(loads, [[1.0, 0.0]], modality="vision", steps=50)
    routed(loads, [[0.5, 0.5]], modality="text", steps=50)
    routed(loads, [[1.0, 0.0]], modality="audio", steps=49)
    (line,) = alarm.check(loads)
    assert ": expert 1 of vision's expert layer 0;" in line


def test_many_dead_experts_are_one_line():
    loads = ExpertLoads()
    routed(loads, [[1.0] + [0.0] * 15], steps=50)
    (line,) = DeadExperts(shared_encoder=True).check(loads)
    assert "dead experts: 15, each" in line and "and 11 more;" in line and "\n" not in line


# --- divergence ---


def loss(value: float, norm: float = 1.0, finite: bool = True) -> dict:
    return {"loss": value, "grad_norm": norm, "finite": finite}


def test_a_loss_that_climbs_over_twice_its_lowest():
    """From 1 the limit is 2.5. The mean of 20 steps, x(n + 1) = x(n) + (4 - x(n)) / 20 = 4 - 3 * 0.95^n, is above it
    from n = 14 on (0.95^14 = 0.488). Back at 1 it falls under half way, 1.75, and a second climb is news again."""
    alarm = Divergence("t")
    records = [loss(1.0)] * 30 + [loss(4.0)] * 40 + [loss(1.0)] * 60 + [loss(4.0)] * 40
    found = steps_with_news(alarm.check, records)
    assert found[0] == 30 + 14 and len(found) == 2 and found[1] > 130
    (line,) = [text for record in records for text in Divergence("t").check(record)] or [""]
    assert line == ""


def test_what_a_climbing_loss_says():
    alarm = Divergence("t")
    lines = [line for record in [loss(1.0)] * 30 + [loss(4.0)] * 14 for line in alarm.check(record)]
    assert lines == [
        "t: diverges: its loss is 2.54 after 1 (running means); lower train.learning_rate or look at the task's data"
    ]


def test_a_small_loss_may_double():
    """Twice 0.1 and 0.5 more is 0.7: 0.6 is no news."""
    assert not steps_with_news(Divergence("t").check, [loss(0.1)] * 30 + [loss(0.6)] * 100)


def test_an_update_that_is_not_finite():
    """Once; again after twenty that were."""
    bad, good = loss(math.nan, math.nan, finite=False), loss(1.0)
    records = [good] * 3 + [bad] * 3 + [good] * 19 + [bad] + [good] * 20 + [bad]
    assert steps_with_news(Divergence("t").check, records) == [4, len(records)]


def test_a_gradient_norm_that_leaps():
    """A hundred times the median of what was, from the 21st step on."""
    norms = [5000.0] + [2.0] * 19 + [200.0, 200.1, 300.0, 2.0, 300.0]
    assert steps_with_news(Divergence("t").check, [loss(1.0, n) for n in norms]) == [22, 25]
    assert not steps_with_news(Divergence("t").check, [loss(1.0, n) for n in [2.0] * 19 + [500.0]])


def test_tasks_diverge_on_their_own():
    alarms = Alarms(shared_encoder=True, feed_advice={})
    lines = []
    for step in range(60):
        for task, norm in (("calm", 1.0), ("wild", 1.0 if step < 40 else 500.0)):
            record = loss(1.0, norm) | {"task": task, "data_wait_s": 0.0, "step_s": 1.0}
            lines += alarms.check(record, ExpertLoads())
    assert lines == ["wild: gradient norm 500, usually 1"]


# --- waiting for data ---


def waits(wait_s: float, task: str = "films") -> dict:
    return {"task": task, "data_wait_s": wait_s, "step_s": 1.0 - wait_s}


def test_waiting_for_data_by_hand():
    """The first 32 steps do not count, and 32 more are wanted. A fifth of the time is no news, more is; then a
    window of 64 must fall below a tenth: of 0.3 each, 43 quiet steps leave 21 * 0.3 / 64 = 0.098."""
    start, even, much = [waits(0.9)] * 32, [waits(0.199)] * 64, [waits(0.3)] * 64
    assert not steps_with_news(DataWait({}).check, start + even)
    assert steps_with_news(DataWait({}).check, start + [waits(0.9)] * 31) == []
    assert steps_with_news(DataWait({}).check, start + much) == [64]
    quiet = [waits(0.0)]
    again = steps_with_news(DataWait({}).check, start + much + 43 * quiet + much)
    # Above a fifth again takes 43 of 0.3 in the window, which drops the 21 old ones first.
    assert again == [64, 32 + 64 + 43 + 43]
    assert steps_with_news(DataWait({}).check, start + much + 42 * quiet + much) == [64]


def test_the_advice_names_the_task_that_waits_most():
    alarm = DataWait({"films": "do this", "sounds": "do that"})
    records = [waits(0.0)] * 32 + [waits(0.25, "films"), waits(0.5, "sounds")] * 16
    (line,) = [text for record in records for text in alarm.check(record)]
    assert line == "38% of the time of the last 32 steps was spent waiting for data, mostly for sounds; do that"
