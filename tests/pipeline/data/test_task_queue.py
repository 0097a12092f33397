"""The queues between a stream and the feed, without Ray: rows in order, errors in their place, an end in time."""

import contextlib
import threading

import numpy as np
import pyarrow as pa
import pytest

from pipeline.data.blocks import Block
from pipeline.data.plan import Arrival, Row
from pipeline.data.task_queue import Fetched, TaskQueues, checked_rows
from pipeline.data.wire import failure_to_arrow, to_arrow
from pipeline.errors import DataError, RequestError


class Order:
    """Blocks of two batches of each task; what is told of them."""

    def __init__(self, *tasks: str):
        self.starts = dict.fromkeys(tasks, 4)
        self.told, self.ended = [], threading.Event()

    def arrived(self, task: str, start: int, rank: int) -> Block:
        return Block(task, start, start + 2, rank)

    def want(self, task: str) -> None:
        self.told.append(f"want {task}")

    def use(self, task: str) -> None:
        self.told.append(f"use {task}")

    def end(self) -> None:
        self.ended.set()


def row(task: str, batch: int, rank: int = 1) -> Row:
    return Row(task, batch, rank, "v", [f"{task}{batch}"], [], {"x": np.full(3, batch)})


def block(task: str, start: int) -> Fetched:
    """Decoded at 10 s for each batch, and here a second later."""
    return here(to_arrow([row(task, start), row(task, start + 1)]), 10.0 * start)


def here(table: pa.Table, decoded_at: float = 0.0) -> Fetched:
    return Fetched(table, Arrival(decoded_at, decoded_at + 1))


def test_each_task_has_its_rows_in_order_whatever_the_order_of_the_blocks():
    tables = [block("b", 6), block("a", 8), block("a", 4), block("a", 6), block("b", 4)]
    order = Order("a", "b")
    queues = TaskQueues(tables, order)
    found, arrivals = {"a": [], "b": []}, {"a": [], "b": []}
    for task, count in (("a", 6), ("b", 4)):
        for _ in range(count):
            found[task].append(queues.by_task[task].next())
            arrivals[task].append(queues.by_task[task].arrival())
    assert [r.batch for r in found["a"]] == [4, 5, 6, 7, 8, 9] and [r.batch for r in found["b"]] == [4, 5, 6, 7]
    assert [r.arrays["x"].tolist() for r in found["b"]] == [[4] * 3, [5] * 3, [6] * 3, [7] * 3]
    assert arrivals == {"a": [(40, 41)] * 2 + [(60, 61)] * 2 + [(80, 81)] * 2, "b": [(40, 41)] * 2 + [(60, 61)] * 2}
    assert [line for line in order.told if line.startswith("use")] == ["use a"] * 6 + ["use b"] * 4
    with pytest.raises(DataError, match="ended before the run did"):
        queues.next("a")
    assert queues.join(60)


def test_an_error_is_raised_where_its_rows_would_be_and_stops_no_other_task():
    failure = failure_to_arrow(RequestError("another manifest"), task="a", batch=6, rank=1)
    queues = TaskQueues([here(failure), block("b", 4), block("a", 4)], Order("a", "b"))
    assert [queues.next("a").batch for _ in range(2)] == [4, 5]
    assert [queues.next("b").batch for _ in range(2)] == [4, 5]
    for _ in range(2):
        with pytest.raises(RequestError, match="another manifest"):
            queues.next("a")


def test_what_the_stream_raises_is_raised_once_its_rows_are_used():
    def tables():
        yield block("a", 4)
        raise OSError("the node is gone")

    queues = TaskQueues(tables(), Order("a", "b"))
    assert [queues.next("a").batch for _ in range(2)] == [4, 5]
    for task in ("a", "b"):
        with pytest.raises(OSError, match="the node is gone"):
            queues.next(task)


def test_a_slow_block_of_one_task_holds_up_no_other():
    slow = threading.Event()

    def tables():
        yield block("a", 4)
        yield block("b", 6)
        assert slow.wait(60)
        yield block("b", 4)

    order = Order("a", "b")
    queues = TaskQueues(tables(), order)
    assert [queues.next("a").batch for _ in range(2)] == [4, 5]
    waits = threading.Thread(target=queues.next, args=("b",))
    waits.start()
    while "want b" not in order.told:
        pass
    slow.set()
    waits.join(60)
    assert not waits.is_alive()


def test_queues_that_are_closed_end_the_stream_and_whoever_waits():
    order = Order("a")

    def tables():
        yield block("a", 4)
        order.ended.wait()
        raise OSError("ended")

    queues = TaskQueues(tables(), order)
    queue = queues.by_task["a"]
    assert [queue.next().batch for _ in range(2)] == [4, 5]

    def wait():
        with contextlib.suppress(OSError, DataError):
            queue.next()

    woken = threading.Thread(target=wait)
    woken.start()
    queue.close()
    assert queue.join(60)
    woken.join(60)
    assert not woken.is_alive()


def test_a_stream_left_half_read_is_closed_in_the_thread_that_reads_it():
    closed, read = [], threading.Event()

    def tables():
        try:
            for start in range(4, 1000, 2):
                yield block("a", start)
                read.set()
        finally:
            closed.append(threading.current_thread().name)

    queues = TaskQueues(tables(), Order("a"))
    assert read.wait(60)
    queues.close()
    assert queues.join(60) and closed == ["streams"]


def test_one_that_cannot_be_woken_is_given_up_in_bounded_time():
    never = threading.Event()
    queues = TaskQueues((block("a", 4) for _ in range(1) if never.wait()), Order("a"))
    queues.close()
    assert not queues.join(0.1)
    never.set()


@pytest.mark.parametrize(
    "rows",
    [
        [row("t", 4), row("t", 6)],
        [row("t", 4), row("u", 5)],
        [row("t", 4, rank=0), row("t", 5)],
        [row("t", 4)],
        [row("t", 4), row("t", 5), row("t", 6)],
    ],
)
def test_rows_that_are_not_those_of_their_block_stop_the_run(rows):
    with pytest.raises(DataError, match="stream of t: expected"):
        list(checked_rows(rows, Block("t", 4, 6, 1)))
