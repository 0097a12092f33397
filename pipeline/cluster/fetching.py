"""Brings decoded blocks from the machines that hold them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import ray

from pipeline.data.plan import Arrival
from pipeline.data.task_queue import Fetched


def fetched(refs: Iterable[ray.ObjectRef], *, end: Callable[[], None]) -> Iterator[Fetched]:
    """The blocks of ``refs``, each as soon as it is here: one on a machine that is slow or lost holds up no other.

    refs: taken by a thread as they come, and each fetched by one of its own; how many there are ahead is up to them.
    end: makes the refs end, whatever they wait for.
    """
    found: queue.SimpleQueue[Fetched | int | BaseException] = queue.SimpleQueue()
    reader = threading.Thread(target=_read, args=(refs, found), name="blocks", daemon=True)
    reader.start()
    try:
        received, all_of_them = 0, None
        while received != all_of_them:
            item = found.get()
            if isinstance(item, int):
                all_of_them = item
                continue
            if isinstance(item, BaseException):
                raise item
            received += 1
            yield item
    finally:
        end()
        reader.join()


def _read(refs: Iterable[ray.ObjectRef], found: queue.SimpleQueue) -> None:
    """Starts to fetch each block; at the end puts their number, or what the refs raised."""
    number = 0
    try:
        for ref in refs:
            threading.Thread(target=_fetch, args=(ref, time.perf_counter(), found), daemon=True).start()
            number += 1
    except BaseException as e:
        found.put(e)
    else:
        found.put(number)


def _fetch(ref: ray.ObjectRef, decoded_at: float, found: queue.SimpleQueue) -> None:
    try:
        table = ray.get(ref)
        found.put(Fetched(table, Arrival(decoded_at, time.perf_counter())))
    except BaseException as e:
        found.put(e)
