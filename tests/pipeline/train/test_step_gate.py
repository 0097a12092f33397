"""All ranks take the same steps and end after the same one, whatever happens to one of them."""

import asyncio
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.train.reject_limit import Draws, RejectCounts, too_many
from pipeline.train.step_gate import NextAction, StepCoordinator, StepGate


def test_the_gate_of_one_process_asks_whether_to_stop():
    asked = iter([False, False, True])
    gate = StepGate(lambda: next(asked))
    assert [gate.next_action(step) for step in range(3)] == [NextAction.STEP, NextAction.STEP, NextAction.STOP]


class Rank:
    """A feed that makes batches one after another, and a loop that asks for the next step while one runs."""

    def __init__(self, coordinator, number, *, num_steps, pause, fails_at=None, ends_at=None):
        self.coordinator, self.number, self.num_steps, self.pause, self.fails_at = (
            coordinator,
            number,
            num_steps,
            pause,
            fails_at,
        )
        self.ends_at = ends_at
        self.ran, self.looks = [], []

    async def feed(self):
        for step in range(self.num_steps):
            await asyncio.sleep(self.pause())
            if step == self.fails_at:
                await self.coordinator.failed(1, self.number, step, f"rank {self.number} has no batch {step}")
                return
            await self.coordinator.ready(1, self.number, step)

    async def loop(self):
        ahead = asyncio.ensure_future(self.coordinator.grant(1, 0))
        for step in range(self.num_steps):
            answer, ahead = ahead, asyncio.ensure_future(self.coordinator.grant(1, step + 1))
            run, look, _ = await answer
            if not run:
                break
            if step == self.ends_at:
                await self.coordinator.end(1, f"rank {self.number} cannot write")
            self.ran.append(step)
            self.looks.append(look)
            await asyncio.sleep(self.pause())
        ahead.cancel()


async def drive(*, world_size, num_steps, seed, fails=(), ends=(), stop_after=None):
    coordinator, draw = StepCoordinator(), random.Random(seed)
    coordinator.check_every_s = 0.005
    await coordinator.begin(world_size)
    fails, ends = dict(fails), dict(ends)
    ranks = [
        Rank(
            coordinator,
            n,
            num_steps=num_steps,
            pause=lambda: draw.random() * 0.003,
            fails_at=fails.get(n),
            ends_at=ends.get(n),
        )
        for n in range(world_size)
    ]

    async def stop():
        if stop_after is not None:
            await asyncio.sleep(stop_after)
            await coordinator.stop()

    await asyncio.wait_for(asyncio.gather(stop(), *(r.feed() for r in ranks), *(r.loop() for r in ranks)), 20)
    assert len({tuple(rank.ran) for rank in ranks}) == len({tuple(rank.looks) for rank in ranks}) == 1
    return coordinator, ranks[0].ran, ranks[0].looks


@given(
    world_size=st.integers(1, 4),
    seed=st.integers(0, 1000),
    fails=st.dictionaries(st.integers(0, 3), st.integers(0, 14), max_size=2),
    ends=st.dictionaries(st.integers(0, 3), st.integers(0, 14), max_size=2),
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


def test_ranks_look_for_preemption_at_the_same_steps():
    _, ran, looks = asyncio.run(drive(world_size=3, num_steps=40, seed=1))
    assert len(ran) == 40 and looks[0] and 1 < sum(looks) < 40


def test_a_new_group_begins_afresh_and_calls_of_the_old_one_end():
    async def story():
        coordinator = StepCoordinator()
        assert await coordinator.begin(2) == 1
        waiting = asyncio.ensure_future(coordinator.grant(1, 0))
        await asyncio.sleep(0)
        assert await coordinator.begin(1, 7) == 2
        assert await waiting == (False, False, None)
        await coordinator.ready(1, 0, 5)  # late, and of no account
        await coordinator.ready(2, 0, 7)
        assert (await coordinator.grant(2, 7))[0]
        await coordinator.stop()
        assert not (await coordinator.grant(2, 8))[0]
        # A stop that was asked for holds for the group after, too.
        await coordinator.begin(1, 8)
        await coordinator.ready(3, 0, 8)
        assert not (await coordinator.grant(3, 8))[0]

    asyncio.run(story())


def test_a_step_waits_for_the_slowest_rank():
    async def story():
        coordinator = StepCoordinator()
        await coordinator.begin(2)
        await coordinator.ready(1, 0, 0)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(coordinator.grant(1, 0), 0.05)
        await coordinator.ready(1, 1, 0)
        assert (await coordinator.grant(1, 0))[0]

    asyncio.run(story())


def test_news_of_batches_may_come_in_another_order():
    async def story():
        coordinator = StepCoordinator()
        await coordinator.begin(1, 8)
        await coordinator.ready(1, 0, 9)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(coordinator.grant(1, 9), 0.05)
        await coordinator.ready(1, 0, 8)
        assert (await asyncio.wait_for(coordinator.grant(1, 9), 1))[0]

    asyncio.run(story())


def test_each_step_wakes_those_that_wait_for_it_alone():
    """At any number of ranks: news of a batch that leaves others missing wakes nobody."""

    async def story():
        coordinator, woken = StepCoordinator(), []
        await coordinator.begin(64)

        async def rank(number: int, step: int):
            await coordinator.grant(1, step)
            woken.append((step, number))

        waiting = [asyncio.ensure_future(rank(number, step)) for step in (0, 1) for number in range(64)]
        await asyncio.sleep(0)
        events = [coordinator._steps[step].decided for step in (0, 1)]
        for number in range(63):
            await coordinator.ready(1, number, 0)
            assert not any(event.is_set() for event in events)
        await coordinator.ready(1, 63, 0)
        await asyncio.sleep(0.01)
        assert woken == [(0, number) for number in range(64)] and not events[1].is_set()
        for task in waiting:
            task.cancel()

    asyncio.run(story())


def test_what_is_remembered_of_steps_is_bounded():
    async def story():
        coordinator = StepCoordinator()
        await coordinator.begin(2)
        for step in range(1000):
            for rank in range(2):
                await coordinator.ready(1, rank, step, Draws("pets", 4, 0))
            assert await coordinator.grant(1, step) == (True, step == 0, ("pets", 8 * (step + 1), 0))
        assert len(coordinator._steps) <= 100

    asyncio.run(story())


# --- rejects ---

STEP_SAMPLES = 256


def shares(samples: np.ndarray, world_size: int) -> list[list[Draws]]:
    """The draws of each rank for each step, of samples that are bad where True: ranks share a batch in equal parts."""
    parts = samples.reshape(-1, world_size, STEP_SAMPLES // world_size)
    names = np.arange(len(samples)).reshape(parts.shape)

    def draws(bad, numbers):
        rejects = [{"id": str(n), "source": "", "reason": "no_text"} for n in numbers[bad]]
        return Draws.of("pets", good=int((~bad).sum()), rejects=rejects)

    return [[draws(*one) for one in zip(*ranks, strict=True)] for ranks in zip(parts, names, strict=True)]


def outcome(samples, world_size: int, *, start: int = 0, counts: dict | None = None, seed: int = 0):
    """(the steps that run, why no more, the counts after each), with news that arrive in a random order."""

    async def story():
        coordinator, draw = StepCoordinator(), random.Random(seed)
        await coordinator.begin(world_size, start, RejectCounts({"pets": 0.05}, counts))
        steps = list(enumerate(shares(samples, world_size)))[start:]
        granted = []
        # A feed is two steps ahead.
        for first in range(0, len(steps), 2):
            news = [(rank, step, d) for step, ranks in steps[first : first + 2] for rank, d in enumerate(ranks)]
            for rank, step, draws in draw.sample(news, len(news)):
                await coordinator.ready(1, rank, step, draws)
            for step, _ in steps[first : first + 2]:
                run, _, total = await coordinator.grant(1, step)
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
    samples = np.random.default_rng(3).random(100 * STEP_SAMPLES) < 0.03
    assert outcome(samples, world_size)[:2] == (100, None)


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
