"""Workers that fail: what is said of it, and which failures end the run."""

import asyncio
import pickle
import types

import pytest
import ray
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus

from pipeline.cluster import failures, trainer
from pipeline.cluster.failures import FailureWatch, in_words, own_error, raise_failure
from pipeline.cluster.spec import Cluster
from pipeline.cluster.worker import noting_failures
from pipeline.errors import DataError, RequestError
from pipeline.train.step_coordinator import StepCoordinator


def failure(error: Exception, *, epoch: int = 1, step: int = 12):
    """The error of a worker as Ray reports it, sent from one process to another."""
    try:
        with noting_failures(types.SimpleNamespace(epoch=epoch, step=step)):
            raise error
    except Exception as e:
        return reported(UserExceptionWithTraceback(e, "Traceback: ..."))


def reported(error: Exception) -> BaseException:
    status = WorkerStatus(running=False, error=pickle.loads(pickle.dumps(error)))
    return WorkerGroupPollStatus({0: status}).errors[0]


DIED = reported(WorkerHealthCheckFailedError("A worker health check failed.", ray.exceptions.ActorDiedError()))


@pytest.fixture
def watch(monkeypatch, tmp_path):
    monkeypatch.setattr(failures.ray, "get", lambda value: value)
    coordinator = StepCoordinator()
    actor = types.SimpleNamespace(
        lost=types.SimpleNamespace(remote=lambda text: asyncio.run(coordinator.lost(text))),
        lines=coordinator._lines,
    )
    return FailureWatch(actor, str(tmp_path)), actor.lines


def test_an_error_has_its_kind_before_it():
    assert in_words(KeyError("abc")) == "KeyError: 'abc'"
    assert in_words(ValueError()) == "ValueError"
    assert in_words(ValueError("two\nlines")) == "ValueError: two lines"
    assert in_words(DataError("the disk is full")) == "the disk is full"


def test_an_error_of_a_stream_is_said_by_its_cause():
    text = (
        "Traceback (most recent call last):\n  File \"a.py\", line 3, in row\n    raise KeyError\nKeyError: 'abc'\n\n"
        "The above exception was the direct cause of the following exception:\n\nray::MapBatches(_BlockMaker)()\n"
        '  File "b.py", line 5, in f\nray.exceptions.UserCodeException: UDF failed to process a data block.'
    )
    error = ray.exceptions.RayTaskError("f", text, ray.exceptions.UserCodeException("UDF failed"))
    assert in_words(error) == "KeyError: 'abc'"
    assert in_words(error.as_instanceof_cause()) == "KeyError: 'abc'"


def test_a_bug_is_said_with_its_kind_place_and_step(watch):
    watch, lines = watch
    watch.after_exception(None, {0: failure(ConnectionError("reset by peer")), 1: failure(KeyError("abc"))})
    ((error, line),) = lines
    assert not error
    assert line.startswith("workers [0, 1] failed; rank 1: KeyError: 'abc' (") and line.endswith(", step 13)\n")
    assert "test_failures.py:" in line
    # A process that died explains the others.
    watch.after_exception(None, {0: failure(KeyError("abc")), 1: DIED})
    assert lines[1][1].startswith(
        "workers [0, 1] failed; rank 1: WorkerHealthCheckFailedError: A worker health check failed."
    )


def test_a_bug_that_comes_again_at_the_same_step_ends_the_run(watch, tmp_path):
    watch, _ = watch
    # Ray may look at one failure several times, and see more of it.
    watch.after_exception(None, {1: failure(KeyError("abc"))})
    watch.after_exception(None, {0: failure(KeyError("abc")), 1: failure(KeyError("abc"))})
    with pytest.raises(DataError, match=r"rank 0: KeyError: 'abc' \(.*, step 13\): the same error twice in a row"):
        watch.after_exception(None, {0: failure(KeyError("abc"), epoch=2)})
    assert "raise error\nKeyError: 'abc'" in (tmp_path / "failure.txt").read_text()


@pytest.mark.parametrize(
    "between",
    [
        {1: failure(KeyError("abc"), epoch=2, step=13)},
        {1: failure(KeyError("other"), epoch=2)},
        {1: failure(ValueError("abc"), epoch=2)},
        {0: failure(KeyError("abc"), epoch=2), 1: DIED},
        {1: DIED},
    ],
)
def test_other_failures_start_the_workers_again(watch, between):
    watch, lines = watch
    for found in ({1: failure(KeyError("abc"))}, between, {1: failure(KeyError("abc"), epoch=3)}):
        watch.after_exception(None, found)
    assert len(lines) == 3


@pytest.mark.parametrize("error", [TimeoutError("storage"), MemoryError(), ray.exceptions.GetTimeoutError("busy")])
def test_errors_of_machines_may_come_again(watch, error):
    watch, lines = watch
    for epoch in range(3):
        watch.after_exception(None, {0: failure(error, epoch=epoch)})
    assert len(lines) == 3


def test_own_errors_end_the_run_at_once(watch):
    watch, _ = watch
    with pytest.raises(RequestError, match="not divisible"):
        watch.after_exception(None, {0: DIED, 1: failure(RequestError("not divisible"))})


def test_own_errors_are_found_in_what_ray_wraps_around_them():
    own = DataError("the disk is full")
    outer = RuntimeError("around")
    outer.__cause__ = own
    assert own_error(outer) is own
    assert own_error(ray.exceptions.RayTaskError("f", "traceback", own)) is own
    assert own_error(KeyError("abc")) is None and own_error(None) is None


def test_workers_that_fail_too_often_are_one_line(tmp_path):
    spec = types.SimpleNamespace(run_dir=str(tmp_path), open_checkpoints=lambda: types.SimpleNamespace(latest_step=40))
    error = ray.train.WorkerGroupError("all of it", {0: failure(KeyError("abc"))})
    with pytest.raises(
        DataError, match=r"max_failures = 3 times; the last: rank 0: KeyError: 'abc'.* whole checkpoint is 40"
    ):
        raise_failure(error, spec, Cluster(max_failures=3))
    assert "all of it" in (tmp_path / "failure.txt").read_text()
    with pytest.raises(RequestError, match="not divisible"):
        raise_failure(ray.train.ControllerError(RequestError("not divisible")), spec, Cluster())
    # As with a GCS that is frozen while the workers end.
    with pytest.raises(
        DataError, match=r"^Ray Train's controller failed: TimeoutError: no answer\. .* whole checkpoint is 40; run"
    ):
        raise_failure(ray.train.ControllerError(TimeoutError("no answer")), spec, Cluster(max_failures=3))


def test_a_lost_raylet_is_one_line_and_a_bug_in_decoding_keeps_its_place(monkeypatch, tmp_path):
    checkpoints = types.SimpleNamespace(latest_step=40)
    spec = types.SimpleNamespace(run_dir=str(tmp_path), open_checkpoints=lambda: checkpoints)
    failing = [ray.exceptions.LocalRayletDiedError(), ray.exceptions.RayTaskError("decode", "a traceback", None)]

    def fit_here(*given) -> dict:
        raise failing.pop(0)

    monkeypatch.setattr(trainer, "fit_here", fit_here)
    with pytest.raises(
        DataError, match=r"processes of Ray were lost: LocalRaylet.* newest whole checkpoint is 40; run"
    ):
        trainer.fit(spec, Cluster(), stop=None)
    assert "LocalRayletDiedError" in (tmp_path / "failure.txt").read_text()
    with pytest.raises(ray.exceptions.RayTaskError):
        trainer.fit(spec, Cluster(), stop=None)
