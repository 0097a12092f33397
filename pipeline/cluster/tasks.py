"""Plain Ray tasks, for work with nothing to keep in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import ray

from pipeline.errors import DataError, RequestError

T = TypeVar("T")
# Seconds between two looks for results.
_LOOK_S = 1.0


def run_tasks(function: Callable[[int], T], numbers: Iterable[int]) -> Iterator[dict[int, T]]:
    """Calls ``function`` for each number, as tasks of the cluster. Yields number → result as results come.

    Yields at least every second, nothing if no result has come. Raises the project's own errors without Ray's wrapping.
    """
    pending = {_call.remote(function, number): number for number in numbers}
    while pending:
        done, _ = ray.wait(list(pending), num_returns=1, timeout=_LOOK_S)
        yield {pending.pop(ref): _result(ref) for ref in done}


@ray.remote(max_retries=2)
def _call(function: Callable[[int], T], number: int) -> T:
    return function(number)


def _result(ref: ray.ObjectRef) -> T:
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as e:
        if isinstance(e.cause, DataError | RequestError):
            raise e.cause from None
        raise
