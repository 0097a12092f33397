"""The queue of one task, without Ray: its thread has ended before Ray is left."""

import contextlib
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.cluster.streams import TaskQueue
from pipeline.errors import DataError

ROOT = Path(__file__).resolve().parents[3]


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


def test_ray_never_starts_by_itself():
    """A call of Ray's outside a session fails, in whatever order things are imported."""
    code = (
        "import pipeline.files, ray\n"
        "try: ray.put(1)\n"
        "except Exception as e: print(type(e).__name__, ray.is_initialized())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.split()[1:] == ["False"], done.stdout + done.stderr
