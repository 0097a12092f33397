"""Plain tasks of the cluster: results as they come, own errors as they were raised."""

import types

import pytest
import ray

from pipeline.cluster import tasks
from pipeline.cluster.tasks import ActorPool, run_tasks
from pipeline.errors import DataError


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """Tasks that run when their results are asked for, the last one first; every second look finds none."""
    looks = iter(range(100))

    def wait(pending, num_returns, timeout):
        return (pending[-1:], pending[:-1]) if next(looks) % 2 else ([], pending)

    def get(task):
        try:
            return task()
        except ray.exceptions.RayActorError:
            raise
        except Exception as e:
            raise ray.exceptions.RayTaskError("make", "Traceback: ...", e) from None

    monkeypatch.setattr(tasks.ray, "wait", wait)
    monkeypatch.setattr(tasks.ray, "get", get)
    monkeypatch.setattr(tasks._call, "remote", lambda function, number: lambda: function(number))


def fails(error: Exception):
    def function(number):
        raise error

    return function


def test_results_come_with_their_numbers():
    assert list(run_tasks(lambda n: n * n, [3, 4])) == [{}, {4: 16}, {}, {3: 9}]
    assert list(run_tasks(lambda n: n * n, [])) == []


def test_own_errors_are_raised_without_what_ray_wraps_around_them():
    with pytest.raises(DataError, match=r"^the disk is full$"):
        list(run_tasks(fails(DataError("the disk is full")), [1]))
    with pytest.raises(ray.exceptions.RayTaskError):
        list(run_tasks(fails(KeyError("abc")), [1]))


class FakeActor:
    """Calls that run when their results are asked for."""

    def __init__(self, make):
        self._function = make()
        self.call = self
        self.asked = []

    @classmethod
    def options(cls, **options):
        return types.SimpleNamespace(remote=cls)

    def remote(self, item):
        self.asked.append(item)
        return lambda: self._function(item)


def test_a_pool_makes_its_object_once_an_actor_and_gives_results_in_order(monkeypatch):
    monkeypatch.setattr(tasks, "_Actor", FakeActor)
    made = []
    pool = ActorPool(lambda: made.append(1) or (lambda n: n * n), num_actors=2, cpus=1)
    results, items = [], iter(range(9))
    for result in pool.map(items):
        results.append(result)
        # Items are taken as results come: two for each actor are ahead.
        assert sum(len(actor.asked) for actor in pool._actors) <= len(results) + 3
    assert results == [n * n for n in range(9)] and len(made) == 2
    assert [actor.asked for actor in pool._actors] == [[0, 2, 4, 6, 8], [1, 3, 5, 7]]
    with pytest.raises(DataError, match=r"^the storage is away$"):
        list(ActorPool(lambda: fails(DataError("the storage is away")), num_actors=1, cpus=1).map([1]))
    lost = ActorPool(lambda: fails(ray.exceptions.RayActorError()), num_actors=1, cpus=1)
    with pytest.raises(DataError, match=r"^a worker was lost more than 3 times \("):
        list(lost.map([1]))
