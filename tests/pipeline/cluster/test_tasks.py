"""Plain tasks of the cluster: results as they come, own errors as they were raised."""

import pytest
import ray

from pipeline.cluster import tasks
from pipeline.cluster.tasks import run_tasks
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
