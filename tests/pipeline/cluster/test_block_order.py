"""Which block is decoded next, without Ray: by first use, within the budget, and never stuck."""

import dataclasses
import gc
import random
import types
import weakref

import pytest

from benchmarks.one_stream import OneTask
from benchmarks.plane import make_schedule
from pipeline.cluster import block_order
from pipeline.cluster.block_order import BlockOrder, TaskBlocks
from pipeline.data.blocks import Block
from pipeline.errors import DataError


class Decoders:
    """As many as the test says; notes what they are told."""

    def __init__(self, number: int):
        self.number, self.notes = number, []

    @property
    def num_decoders(self) -> int:
        return self.number

    def max_unfinished(self) -> int:
        return self.number

    def note(self, unfinished: int, *, waits: bool) -> None:
        self.notes.append((unfinished, waits))

    def lack(self) -> str:
        return "0 of the cluster's 4 CPUs are free"

    def wanted(self) -> int:
        return self.number


@dataclasses.dataclass
class Steps:
    """The steps of a run as a text, one letter a step; the first ``decided_until`` of them are known."""

    text: str
    decided_until: int
    start: int = 0

    @property
    def num_steps(self) -> int:
        return len(self.text)

    def __getitem__(self, step: int) -> types.SimpleNamespace:
        assert step < self.decided_until
        return types.SimpleNamespace(task=self.text[step], batch=self.text[:step].count(self.text[step]))


def order_of(
    text: str, *, rows: int = 2, max_bytes: int = 100, decided: int | None = None, decoders: int = 100
) -> BlockOrder:
    """Rows have one byte, and tasks the letters' shares."""
    tasks = [
        TaskBlocks(name, 0, text.count(name), text.count(name) / len(text), rows_per_block=rows, row_bytes=1)
        for name in sorted(set(text))
    ]
    steps = Steps(text, len(text) if decided is None else decided)
    return BlockOrder(tasks, steps, rank=3, max_bytes=max_bytes, decoders=Decoders(decoders))


def taken(order: BlockOrder) -> list[str]:
    """All blocks that may start now, as "task start-stop"; each arrives at once."""
    found = []
    while (table := order.take(0)) is not None:
        block = Block.described(table)
        assert order.arrived(block.task, block.start, 3) == block
        found.append(f"{block.task} {block.start}-{block.stop}")
    return found


def test_blocks_come_in_the_order_of_their_first_use_and_begin_small():
    order = order_of("aabaaaabbb", rows=4)
    # 1, 2, 4 batches of a task, as far as it has any; the step that lacks its batch is the one that decides.
    assert taken(order) == ["a 0-1", "a 1-3", "b 0-1", "a 3-6", "b 1-3", "b 3-4"]
    assert order.exhausted()


def test_the_budget_is_given_back_when_the_last_row_of_a_block_is_used():
    order = order_of("aaaaaaaa", max_bytes=4)
    assert taken(order) == ["a 0-1", "a 1-3"] and order.bytes_ahead == 3
    order.use("a")
    assert order.bytes_ahead == 2 and taken(order) == ["a 3-5"]
    order.use("a")
    # Half of a block is used: all of it is still there.
    assert order.bytes_ahead == 4 and taken(order) == []
    order.use("a")
    assert taken(order) == ["a 5-7"]


def test_what_training_waits_for_is_decoded_whatever_the_budget():
    order = order_of("abab", max_bytes=1)
    assert taken(order) == ["a 0-1"]
    order.use("a")
    assert taken(order) == ["b 0-1"]
    order = order_of("ab", max_bytes=0)
    assert taken(order) == []
    order.want("a")
    assert taken(order) == ["a 0-1"]
    # It is on its way.
    order.want("a")
    assert taken(order) == []


@pytest.mark.parametrize("max_bytes", [0, 3, 7, 1000])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_run_ends_under_any_budget_and_keeps_to_it(max_bytes, rows):
    draw = random.Random(7)
    text = "".join(draw.choice("aaaabbc") for _ in range(300))
    order, made, used = order_of(text, rows=rows, max_bytes=max_bytes), dict.fromkeys("abc", 0), []
    for name in text:
        for line in taken(order):
            made[line[0]] = int(line.partition("-")[2])
        if used.count(name) >= made[name]:
            order.want(name)
            (line,) = taken(order)[:1]
            assert line[0] == name
            made[name] = int(line.partition("-")[2])
        order.use(name)
        used.append(name)
        # A block of each task at most is there because it was waited for.
        assert order.bytes_ahead <= max_bytes + 3 * rows
    assert order.bytes_ahead == 0 and order.exhausted()


def test_while_losses_decide_every_task_has_a_block_in_stock_and_no_more():
    order = order_of("ababbbbbbbbb", rows=2, decided=2)
    assert taken(order) == ["a 0-1", "b 0-1", "b 1-3", "a 1-2"]
    order.use("a")
    order.use("b")
    assert taken(order) == []
    order.use("b")
    assert taken(order) == ["b 3-5"]
    assert not order.exhausted()


def test_a_sampler_that_learns_never_waits_and_wastes_no_more_than_a_block_a_task():
    data, schedule = make_schedule(5, 400, sampler="bandit")
    tasks = [
        TaskBlocks(name, 0, schedule.batches_at_most(name), schedule.share(name), rows_per_block=4, row_bytes=1)
        for name in data.tasks
    ]
    order = BlockOrder(tasks, schedule, rank=0, max_bytes=40, decoders=Decoders(100))
    draw, made = random.Random(1), dict.fromkeys(data.tasks, 0)
    for step in range(400):
        while (table := order.take(0)) is not None:
            made[Block.described(table).task] = Block.described(table).stop
        assert schedule[step].batch < made[schedule[step].task] and order.bytes_ahead <= 40
        order.use(schedule[step].task)
        schedule.observe(step, draw.random())
    assert 400 <= sum(made.values()) <= 400 + 5 * 4


def test_decoders_get_no_more_blocks_than_they_may_have():
    order = order_of("aaaa", decoders=2)
    assert order.take(2) is None
    assert order.take(1) is not None


def test_a_block_that_is_not_due_ends_the_run():
    order = order_of("ab")
    assert order.take(0) and order.take(0)
    assert order.arrived("b", 0, 3) == Block("b", 0, 1, 3)
    for strange in (("b", 0, 3), ("a", 1, 3), ("a", 0, 2), ("c", 0, 3)):
        with pytest.raises(DataError, match="expected one of the blocks a 0 of rank 3, found"):
            order.arrived(*strange)


def test_what_a_block_is_made_from_is_kept_until_it_has_arrived():
    order, kept = order_of("aab", rows=1), []
    for _ in range(3):
        assert order.take(0) is not None
        ref = type("Ref", (), {})()
        order.keep(ref)
        kept.append(weakref.ref(ref))
        del ref
    order.arrived("a", 1, 3)
    gc.collect()
    assert [ref() is None for ref in kept] == [False, True, False]


def test_who_holds_up_is_named(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(block_order, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    order = order_of("abc", decoders=2)
    assert order.held_up("b") == "no decoder has it yet"
    for unfinished in range(2):
        order.take(unfinished)
    now[0] += 41
    assert order.held_up("b") == "given to a decoder 41 s ago; 0 of the cluster's 4 CPUs are free"
    assert order.held_up("c") == "the decoders have 2 blocks of a, b"


def test_a_run_of_any_length_begins_at_once():
    tasks = [TaskBlocks("a", 5, 10**12, 1.0, rows_per_block=8, row_bytes=1)]
    order = BlockOrder(tasks, OneTask("a", 5, 10**12), rank=0, max_bytes=20, decoders=Decoders(100))
    stops = []
    for start in (5, 6, 8, 12):
        stops.append(Block.described(order.take(0)).stop)
        order.arrived("a", start, 0)
    assert stops == [6, 8, 12, 20] and order.take(0) is None


def test_a_block_of_slow_batches_holds_few(monkeypatch):
    """Training waits for whole blocks: 16 batches of a minute each would look like a hang."""
    now = [100.0]
    monkeypatch.setattr(block_order, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    tasks = [TaskBlocks("a", 0, 10**6, 1.0, rows_per_block=16, row_bytes=1)]
    order, sizes = BlockOrder(tasks, OneTask("a", 0, 10**6), rank=0, max_bytes=10**6, decoders=Decoders(100)), []
    # Seconds of a batch: slow; one that starts its decoder; fast; storage that fails for a while.
    for batch_s in (60, 60, 60, 3, 3, 0.1, 0.1, 40, 0.1, 0.1):
        block = Block.described(order.take(0))
        now[0] += batch_s * (block.stop - block.start)
        order.arrived("a", block.start, 0)
        sizes.append(block.stop - block.start)
    assert sizes == [1, 1, 1, 1, 3, 3, 11, 16, 1, 16]
    # Nothing is known of a task before its first block has arrived.
    other = BlockOrder(
        [TaskBlocks("a", 0, 99, 1.0, 16, 1)], OneTask("a", 0, 99), rank=0, max_bytes=99, decoders=Decoders(9)
    )
    assert [Block.described(other.take(0)).stop for _ in range(4)] == [1, 2, 3, 4]


def test_decoders_learn_when_training_waits_for_more_of_them():
    order = order_of("aaaa", rows=1)
    order.want("a")
    order.take(0)
    # Before the first row it waits for decoders to start.
    assert order._decoders.notes == [(0, False)]
    order.arrived("a", 0, 3)
    order.use("a")
    order.take(0)
    order.want("a")
    order.take(1)
    order.use("a")
    order.take(1)
    assert order._decoders.notes[1:] == [(0, False), (1, True), (1, False)]
    assert order.cpus_wanted() == 100
