"""All ranks take the same steps and end after the same one, whatever happens to one of them."""

import asyncio
import itertools
import random
import types
from concurrent.futures import Future
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.train import step_coordinator
from pipeline.train.reject_limit import Draws, RejectCounts, too_many
from pipeline.train.step_coordinator import (
    REFUSED,
    StepCoordinator,
    callers_of,
    callers_of_coordinator,
    groups_of,
)
from pipeline.train.step_gate import NextAction, StepGate
from pipeline.train.step_requests import StepGroup, StepRequests


def connect(
    coordinator: StepCoordinator, world_size: int, *, epoch: int = 1, start_step: int = 0
) -> list[StepRequests]:
    """The requests of all ranks, through groups as the actors make them, in the loop that runs."""
    loop = asyncio.get_running_loop()

    def call(function, *args):
        return asyncio.run_coroutine_threadsafe(function(*args), loop)

    groups = {}

    def requests(rank: int) -> StepRequests:
        step = partial(coordinator.step, epoch)
        for ranks in groups_of(rank, world_size):
            if ranks not in groups:
                groups[ranks] = StepGroup(len(callers_of(ranks)), partial(step, ranks.start))
            step = groups[ranks].step
        return StepRequests(start_step, ask=partial(call, step, rank), over=call(coordinator.over, epoch))

    return [requests(rank) for rank in range(world_size)]


# Seconds for what must come, on any machine.
PATIENCE_S = 200


def wait_for(answer) -> asyncio.Future:
    return asyncio.wait_for(asyncio.wrap_future(answer), PATIENCE_S)


@pytest.fixture
def set_clock(monkeypatch):
    """A function that gives coordinators a clock of its own: its readings, one after the other."""

    def set_clock(readings) -> None:
        monkeypatch.setattr(step_coordinator, "time", types.SimpleNamespace(monotonic=lambda: next(readings)))

    return set_clock


NONE_DRAWN = Draws("pets", 0, 0)


def test_the_gate_of_one_process_asks_whether_to_stop():
    asked = iter([False, False, True])
    gate = StepGate(lambda: next(asked))
    assert [gate.next_action(step) for step in range(3)] == [NextAction.STEP, NextAction.STEP, NextAction.STOP]


@given(st.integers(1, 3000), st.data())
def test_groups_are_a_tree_over_all_ranks(world_size, data):
    callers = callers_of_coordinator(world_size)
    assert [rank for ranks in callers for rank in ranks] == list(range(world_size))
    assert len(callers) == world_size if world_size <= 8 else 1 < len(callers) <= 4
    rank = data.draw(st.integers(0, world_size - 1))
    for ranks in groups_of(rank, world_size):
        assert rank in ranks and ranks in callers
        callers = callers_of(ranks)
        assert [one for part in callers for one in part] == list(ranks) and 2 <= len(callers) <= 8
        sizes = {len(part) for part in callers}
        assert max(sizes) - min(sizes) <= 1
    assert range(rank, rank + 1) in callers


def test_the_groups_of_some_sizes():
    assert groups_of(7, 8) == []
    assert [groups_of(rank, 9) for rank in (3, 4)] == [[range(0, 4)], [range(4, 9)]]
    assert groups_of(70, 256) == [range(64, 128), range(64, 72)]


class Rank:
    """A feed that makes batches one after another, and a loop that asks for the next step while one runs."""

    def __init__(self, coordinator, requests, number, *, num_steps, pause, fails_at=None, ends_at=None):
        self.coordinator, self.requests, self.number = coordinator, requests, number
        self.num_steps, self.pause, self.fails_at, self.ends_at = num_steps, pause, fails_at, ends_at
        self.ran, self.looks = [], []

    async def feed(self):
        for step in range(self.num_steps):
            await asyncio.sleep(self.pause())
            if step == self.fails_at:
                await self.coordinator.failed(1, self.number, step, f"rank {self.number} has no batch {step}")
                return
            self.requests.ready(step, NONE_DRAWN)

    async def loop(self):
        for step in range(self.num_steps):
            run, look, _ = await wait_for(self.requests.answer(step))
            if not run:
                break
            if step == self.ends_at:
                await self.coordinator.end(1, f"rank {self.number} cannot write")
            self.ran.append(step)
            self.looks.append(look)
            await asyncio.sleep(self.pause())


async def drive(*, world_size, num_steps, seed, fails=(), ends=(), stop_after=None, check_every_s=0.005):
    coordinator, draw = StepCoordinator(), random.Random(seed)
    coordinator.check_every_s = check_every_s
    await coordinator.begin(world_size)
    fails, ends = dict(fails), dict(ends)
    ranks = [
        Rank(
            coordinator,
            requests,
            n,
            num_steps=num_steps,
            pause=lambda: draw.random() * 0.003,
            fails_at=fails.get(n),
            ends_at=ends.get(n),
        )
        for n, requests in enumerate(connect(coordinator, world_size))
    ]

    async def stop():
        if stop_after is not None:
            await asyncio.sleep(stop_after)
            await coordinator.stop()

    await asyncio.wait_for(asyncio.gather(stop(), *(r.feed() for r in ranks), *(r.loop() for r in ranks)), PATIENCE_S)
    assert len({tuple(rank.ran) for rank in ranks}) == len({tuple(rank.looks) for rank in ranks}) == 1
    return coordinator, ranks[0].ran, ranks[0].looks


@given(
    world_size=st.integers(1, 4) | st.sampled_from((9, 20, 70)),
    seed=st.integers(0, 1000),
    fails=st.dictionaries(st.integers(0, 69), st.integers(0, 14), max_size=2),
    ends=st.dictionaries(st.integers(0, 69), st.integers(0, 14), max_size=2),
    stop_after=st.none() | st.floats(0, 0.03),
)
@settings(max_examples=40, deadline=None)
def test_all_ranks_run_the_same_steps(world_size, seed, fails, ends, stop_after):
    fails, ends = ({rank: step for rank, step in x.items() if rank < world_size} for x in (fails, ends))
    coordinator, ran, _ = asyncio.run(
        drive(world_size=world_size, num_steps=15, seed=seed, fails=fails, ends=ends, stop_after=stop_after)
    )
    first = min(fails.values(), default=15)
    assert ran == list(range(len(ran))) and len(ran) <= first
    if stop_after is None and min(ends.values(), default=15) < first:
        # Not before the step at which a rank says so, and where a rank has no batch none after it either.
        assert len(ran) > min(ends.values()) and coordinator.reason
    elif stop_after is None:
        assert len(ran) == first
        assert coordinator.reason is None if not fails else f"has no batch {first}" in coordinator.reason


def test_ranks_look_for_preemption_at_the_same_steps(set_clock):
    """The clock goes on by a second when it is read: once a step, and once more to note a look."""
    set_clock(itertools.count(100))
    _, ran, looks = asyncio.run(drive(world_size=3, num_steps=40, seed=1, check_every_s=5))
    assert len(ran) == 40 and looks == [step % 6 == 0 for step in range(40)]


def test_a_new_group_begins_afresh_and_calls_of_the_old_one_end():
    async def story():
        coordinator = StepCoordinator()
        assert await coordinator.begin(2) == 1
        old = connect(coordinator, 2)
        # One rank has asked; the other has no batch yet.
        old[0].ready(0, NONE_DRAWN)
        waiting = [requests.answer(0) for requests in old]
        await asyncio.sleep(0.01)
        assert await coordinator.begin(1, 7) == 2
        assert [await wait_for(answer) for answer in waiting] == [REFUSED] * 2
        old[1].ready(0, NONE_DRAWN)  # late, and of no account
        (new,) = connect(coordinator, 1, epoch=2, start_step=7)
        new.ready(7, NONE_DRAWN)
        assert (await wait_for(new.answer(7)))[0]
        await coordinator.stop()
        assert await wait_for(new.answer(8)) == REFUSED
        # A stop that was asked for holds for the group after, too.
        await coordinator.begin(1, 8)
        (after,) = connect(coordinator, 1, epoch=3, start_step=8)
        after.ready(8, NONE_DRAWN)
        assert await wait_for(after.answer(8)) == REFUSED and await coordinator.last() == 8

    asyncio.run(story())


@pytest.mark.parametrize("world_size", [2, 20])
def test_a_step_waits_for_the_slowest_rank(world_size):
    async def story():
        coordinator = StepCoordinator()
        await coordinator.begin(world_size)
        *others, slowest = connect(coordinator, world_size)
        for requests in others:
            requests.ready(0, NONE_DRAWN)
        answers = [requests.answer(0) for requests in (*others, slowest)]
        await asyncio.sleep(0.05)
        assert not any(answer.done() for answer in answers)
        slowest.ready(0, NONE_DRAWN)
        assert {(await wait_for(answer))[0] for answer in answers} == {True}

    asyncio.run(story())


def test_a_step_is_asked_for_while_the_one_before_runs_and_no_sooner():
    """What is granted must be run, so a stop would have to wait for more steps."""
    asked, over = [], Future()
    requests = StepRequests(3, ask=lambda step, draws: asked.append(step) or Future(), over=over)
    for step in (3, 4, 5, 6):
        requests.ready(step, NONE_DRAWN)
    assert asked == []
    answer = requests.answer(3)
    assert asked == [3, 4] and not answer.done()
    assert requests.answer(3) is answer
    requests.answer(4)
    assert asked == [3, 4, 5]


def test_a_lost_coordinator_ends_the_wait_of_a_rank_without_a_batch():
    over = Future()
    requests = StepRequests(0, ask=lambda step, draws: Future(), over=over)
    answer = requests.answer(0)
    over.set_exception(OSError("gone"))
    for one in (answer, requests.answer(0), requests.answer(1)):
        with pytest.raises(OSError, match="gone"):
            one.result(0)


def test_a_lost_group_ends_the_wait_of_its_ranks():
    lost = Future()
    requests = StepRequests(0, ask=lambda step, draws: lost, over=Future())
    requests.ready(0, NONE_DRAWN)
    answer = requests.answer(0)
    lost.set_exception(OSError("gone"))
    with pytest.raises(OSError, match="gone"):
        answer.result(0)


def test_an_error_of_the_coordinator_reaches_every_rank_of_a_group():
    async def fail(step, draws):
        raise OSError("gone")

    async def story():
        group = StepGroup(3, fail)
        return await asyncio.gather(*(group.step(rank, 0, NONE_DRAWN) for rank in range(3)), return_exceptions=True)

    assert [str(error) for error in asyncio.run(story())] == ["gone"] * 3


def test_ranks_find_the_actor_of_their_group():
    async def story():
        coordinator = StepCoordinator()
        await coordinator.begin(20)
        first, second = range(0, 10), range(10, 20)
        waiting = [asyncio.ensure_future(coordinator.group(1, ranks)) for ranks in (first, second)]
        await asyncio.sleep(0)
        await coordinator.lead(1, second, "second")
        await asyncio.sleep(0.01)
        assert not waiting[0].done() and await waiting[1] == "second"
        await coordinator.begin(20)
        assert await waiting[0] is None
        await coordinator.lead(1, first, "late")
        await coordinator.lead(2, first, "first")
        assert await coordinator.group(2, first) == "first"

    asyncio.run(story())


def test_requests_may_come_in_another_order():
    async def story():
        coordinator = StepCoordinator()
        await coordinator.begin(1, 8)
        second = asyncio.ensure_future(coordinator.step(1, 0, 9, NONE_DRAWN))
        await asyncio.sleep(0.05)
        assert not second.done()
        assert (await coordinator.step(1, 0, 8, NONE_DRAWN))[0]
        assert (await asyncio.wait_for(second, PATIENCE_S))[0]

    asyncio.run(story())


def test_each_step_wakes_those_that_wait_for_it_alone():
    """News of a batch that leaves others missing wakes nobody."""

    async def story():
        coordinator, woken = StepCoordinator(), []
        await coordinator.begin(8)

        async def ask(rank: int, step: int):
            await coordinator.step(1, rank, step, NONE_DRAWN)
            woken.append((step, rank))

        waiting = [asyncio.ensure_future(ask(rank, 1)) for rank in range(8)]
        waiting += [asyncio.ensure_future(ask(rank, 0)) for rank in range(7)]
        await asyncio.sleep(0.01)
        events = [coordinator._steps[step].decided for step in (0, 1)]
        assert not woken and not any(event.is_set() for event in events)
        await ask(7, 0)
        await asyncio.gather(*waiting)
        assert sorted(woken) == [(step, rank) for step in (0, 1) for rank in range(8)]

    asyncio.run(story())


def test_nothing_is_remembered_of_steps_that_have_begun(set_clock):
    # All of them within the time between two looks for preemption.
    set_clock(itertools.repeat(100))

    async def story():
        coordinator = StepCoordinator()
        await coordinator.begin(20)
        ranks = connect(coordinator, 20)
        for step in range(200):
            for requests in ranks:
                requests.ready(step, Draws("pets", 4, 0))
            answers = [requests.answer(step) for requests in ranks]
            total = "pets", 80 * (step + 1), 0
            assert {await wait_for(answer) for answer in answers} == {(True, step == 0, total)}
        assert not coordinator._steps and max(len(requests._answers) for requests in ranks) <= 2

    asyncio.run(story())


# --- rejects ---

STEP_SAMPLES = 256


def shares(samples: np.ndarray, world_size: int) -> list[list[Draws]]:
    """The draws of each rank for each step, of samples that are bad where True: ranks share a batch in equal parts."""
    parts = samples.reshape(-1, world_size, STEP_SAMPLES // world_size)
    names = np.arange(len(samples)).reshape(parts.shape)

    def draws(bad, numbers):
        rejects = [{"id": str(n), "source": "", "reason": "no_text"} for n in numbers[bad]]
        return Draws.of("pets", samples=len(bad), rejects=rejects)

    return [[draws(*one) for one in zip(*ranks, strict=True)] for ranks in zip(parts, names, strict=True)]


def outcome(samples, world_size: int, *, start: int = 0, counts: dict | None = None, seed: int = 0):
    """(the steps that run, why no more, the counts after each), with news that arrive in a random order."""

    async def story():
        coordinator, draw = StepCoordinator(), random.Random(seed)
        await coordinator.begin(world_size, start, RejectCounts({"pets": 0.05}, counts))
        ranks = connect(coordinator, world_size, start_step=start)
        steps = list(enumerate(shares(samples, world_size)))[start:]
        granted = []
        # A feed is two steps ahead.
        for first in range(0, len(steps), 2):
            news = [(rank, step, d) for step, drawn in steps[first : first + 2] for rank, d in enumerate(drawn)]
            # Of each rank in order of steps, of all ranks in any order.
            for rank, step, draws in sorted(draw.sample(news, len(news)), key=lambda one: one[1]):
                ranks[rank].ready(step, draws)
            for step, _ in steps[first : first + 2]:
                asked = [requests.answer(step) for requests in ranks]
                answers = {await wait_for(answer) for answer in asked}
                assert len({(run, total) for run, _, total in answers}) == 1
                run, _, total = answers.pop()
                granted += [total] if run else []
        return len(granted), coordinator.reason, granted

    return asyncio.run(story())


def test_every_number_of_ranks_ends_before_the_same_step_for_the_same_reason():
    samples = np.random.default_rng(7).random(12 * STEP_SAMPLES) < 0.08
    alone = outcome(samples, 1)
    assert 0 < alone[0] < 2000 / STEP_SAMPLES
    # The step it ends before is the first after which the share is too much.
    bad = np.cumsum(samples.reshape(-1, STEP_SAMPLES).sum(1)).tolist()
    first = next(i for i, k in enumerate(bad) if too_many(STEP_SAMPLES * (i + 1), k, limit=0.05))
    assert alone[0] == first and f"{bad[first]} of {STEP_SAMPLES * (first + 1)} samples were bad" in alone[1]
    for world_size, seed in ((2, 1), (8, 2), (256, 3)):
        assert outcome(samples, world_size, seed=seed) == alone


@pytest.mark.parametrize("world_size", [1, 8, 256])
def test_healthy_data_go_on_at_every_number_of_ranks(world_size):
    samples = np.random.default_rng(3).random(40 * STEP_SAMPLES) < 0.03
    assert outcome(samples, world_size)[:2] == (40, None)


def test_a_resume_goes_on_from_the_counts_before_its_step():
    """Steps that are drawn again are not counted again."""
    samples = np.random.default_rng(7).random(12 * STEP_SAMPLES) < 0.08
    steps, reason, totals = outcome(samples, 2)
    _, drawn, rejected = totals[1]
    stored = {"pets": {"drawn": drawn, "rejected": rejected}}
    assert outcome(samples, 4, start=2, counts=stored) == (steps - 2, reason, totals[2:])


def test_one_process_ends_as_a_coordinator_does():
    samples = np.random.default_rng(7).random(12 * STEP_SAMPLES) < 0.08
    steps, reason, totals = outcome(samples, 1)
    gate = StepGate()
    gate.open(RejectCounts({"pets": 0.05}))
    batches = [one for (one,) in shares(samples, 1)]
    for step in range(steps):
        gate.ready(step, batches[step])
    # The feed is ahead of the loop, a checkpoint holds what was drawn before its step.
    for step in range(steps):
        gate.next_action(step)
        before = totals[step - 1][1:] if step else (0, 0)
        assert gate.rejects_before(step).as_dict() == {"pets": dict(zip(("drawn", "rejected"), before, strict=True))}
    with pytest.raises(DataError) as caught:
        gate.ready(steps, batches[steps])
    assert str(caught.value) == reason
