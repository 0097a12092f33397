"""The queue of one task, without Ray: its thread has ended before Ray is left."""

import contextlib
import threading
import types

import pytest

from pipeline.data.task_queue import TaskQueue, checked_rows
from pipeline.errors import DataError


def test_rows_come_in_order_and_the_end_is_said():
    queue = TaskQueue(iter(range(5)), task="t", depth=2)
    assert [queue.next() for _ in range(5)] == list(range(5))
    with pytest.raises(DataError, match="ended before the run did"):
        queue.next()
    assert queue.join(10)


def test_what_a_stream_raises_is_raised():
    def rows():
        yield 1
        raise DataError("the disk is gone")

    queue = TaskQueue(rows(), task="t", depth=2)
    assert queue.next() == 1
    with pytest.raises(DataError, match="the disk is gone"):
        queue.next()


def test_a_full_queue_ends_and_closes_its_stream_in_its_own_thread():
    closed = []

    def rows():
        try:
            while True:
                yield 1
        finally:
            closed.append(threading.current_thread().name)

    queue = TaskQueue(rows(), task="t", depth=2)
    queue.next()
    queue.close()
    assert queue.join(10) and closed == ["stream-t"]


class Ended(Exception):
    pass


def test_a_queue_that_waits_for_a_row_that_never_comes_ends():
    wake, waits = threading.Event(), threading.Event()

    def rows():
        waits.set()
        wake.wait()
        raise Ended
        yield

    queue = TaskQueue(rows(), task="t", depth=2, end=wake.set)

    def wait():
        with contextlib.suppress(DataError, Ended):
            queue.next()

    woken = threading.Thread(target=wait)
    woken.start()
    waits.wait(10)
    queue.close()
    assert queue.join(10)
    woken.join(10)
    assert not woken.is_alive()


def test_one_that_cannot_be_woken_is_given_up_in_bounded_time():
    never = threading.Event()
    queue = TaskQueue((never.wait() for _ in range(1)), task="t", depth=2)
    queue.close()
    assert not queue.join(0.1)
    never.set()


def test_rows_out_of_order_stop_the_run():
    rows = [types.SimpleNamespace(task="t", batch=batch, rank=1) for batch in (2, 3, 5)]
    checked = checked_rows(rows, task="t", start=2, rank=1)
    assert [next(checked).batch for _ in range(2)] == [2, 3]
    with pytest.raises(DataError, match=r"stream of t: expected batch 4 for rank 1, found \('t', 5, 1\)"):
        next(checked)
    for other in ({"task": "u"}, {"rank": 0}):
        with pytest.raises(DataError, match="expected batch 2 for rank 1"):
            next(
                checked_rows(
                    [types.SimpleNamespace(**{"task": "t", "batch": 2, "rank": 1} | other)], task="t", start=2, rank=1
                )
            )
