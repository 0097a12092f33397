"""All ranks take the same steps and end after the same one, whatever happens to one of them."""

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
            run, look = await answer
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
        assert await coordinator.begin(1) == 2
        assert await waiting == (False, False)
        await coordinator.ready(1, 0, 5)  # late, and of no account
        await coordinator.ready(2, 0, 7)
        assert (await coordinator.grant(2, 7))[0]
        await coordinator.stop()
        assert not (await coordinator.grant(2, 8))[0]
        # A stop that was asked for holds for the group after, too.
        await coordinator.begin(1)
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
        await coordinator.begin(1)
        await coordinator.ready(1, 0, 9)
        await coordinator.ready(1, 0, 8)
        assert (await asyncio.wait_for(coordinator.grant(1, 9), 1))[0]

    asyncio.run(story())
