"""Plain Ray tasks, for work with nothing to keep in order, and a pool of actors, for work with something to keep."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray

from pipeline.errors import DataError, RequestError, one_line

T = TypeVar("T")
# Seconds between two looks for results.
_LOOK_S = 1.0
# Calls that each actor of a pool has before it, so that it never waits for the driver.
_CALLS_AHEAD = 2
# Times that a lost actor is made again, and that a call is repeated with it.
_RETRIES = 3


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
    except ray.exceptions.RayActorError as e:
        reason = one_line(e, limit=300)
        raise DataError(f"a worker was lost more than {_RETRIES} times ({reason}); is its memory short?") from e


class ActorPool:
    """Actors that each make an object once, spread over the machines, and share its calls.

    make: returns the object, a function of one item; pickled by name. cpus, gpus: of each actor.
    """

    def __init__(
        self, make: Callable[[], Callable[[Any], T]], *, num_actors: int, cpus: float, gpus: float = 0
    ) -> None:
        options = {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": "SPREAD"}
        retries = {"max_restarts": _RETRIES, "max_task_retries": _RETRIES}
        self._actors = [_Actor.options(**options, **retries).remote(make) for _ in range(num_actors)]

    def map(self, items: Iterable[Any]) -> Iterator[T]:
        """The results of all items, in their order; at most a few are computed ahead of the one that is yielded."""
        pending: collections.deque[ray.ObjectRef] = collections.deque()
        for number, item in enumerate(items):
            pending.append(self._actors[number % len(self._actors)].call.remote(item))
            if len(pending) >= _CALLS_AHEAD * len(self._actors):
                yield _result(pending.popleft())
        while pending:
            yield _result(pending.popleft())

    def close(self) -> None:
        """Ends the actors."""
        for actor in self._actors:
            ray.kill(actor)


@ray.remote
class _Actor:
    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        self._function = make()

    def call(self, item: Any) -> Any:
        return self._function(item)
