"""The queue of one task between its stream and the feed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator

from pipeline.data.plan import Row
from pipeline.errors import DataError


def checked_rows(rows: Iterable[Row], *, task: str, start: int, rank: int) -> Iterator[Row]:
    """Passes the rows on. Raises DataError at the first that is not the next one of this task and rank."""
    for expected, row in enumerate(rows, start):
        found = (row.task, row.batch, row.rank)
        if found != (task, expected, rank):
            raise DataError(f"stream of {task}: expected batch {expected} for rank {rank}, found {found}")
        yield row


class TaskQueue:
    """A thread that pulls a stream's rows ahead of the feed, at most ``depth`` of them.

    end: called by ``join`` to wake a thread that waits for the stream's next row.
    """

    def __init__(self, rows: Iterable[Row], *, task: str, depth: int, end: Callable[[], None] = lambda: None):
        self._rows = rows
        self._depth = depth
        self._end = end
        self._ready: list[Row] = []
        self._condition = threading.Condition()
        self._failure: BaseException | None = None
        self._done = False
        self._thread = threading.Thread(target=self._pull, name=f"stream-{task}", daemon=True)
        self._thread.start()

    def _pull(self) -> None:
        try:
            for row in self._rows:
                with self._condition:
                    self._condition.wait_for(lambda: self._done or len(self._ready) < self._depth)
                    if self._done:
                        return
                    self._ready.append(row)
                    self._condition.notify_all()
        except BaseException as e:
            self._failure = e
        finally:
            with self._condition:
                self._done = True
                self._condition.notify_all()
            # In this thread, which ``join`` waits for: a stream left half read ends what it has started.
            if isinstance(self._rows, Generator):
                self._rows.close()

    def next(self) -> Row:
        """Waits for the next row. Raises what the stream raised."""
        with self._condition:
            self._condition.wait_for(lambda: self._ready or self._done)
            if self._ready:
                row = self._ready.pop(0)
                self._condition.notify_all()
                return row
        if self._failure is not None:
            raise self._failure
        raise DataError("the stream ended before the run did")

    def close(self) -> None:
        """Drops the rows and wakes every thread that waits for one. ``join`` then waits for the queue's thread."""
        with self._condition:
            self._done = True
            self._ready.clear()
            self._condition.notify_all()

    def join(self, timeout_s: float) -> bool:
        """Whether the thread ended within ``timeout_s``: after that nothing calls Ray for this queue."""
        deadline = time.monotonic() + timeout_s
        while self._thread.is_alive():
            # Repeated, because a stream may only just be starting.
            self._end()
            self._thread.join(timeout=0.1)
            if time.monotonic() >= deadline:
                break
        return not self._thread.is_alive()
