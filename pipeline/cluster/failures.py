"""Failures of workers: those that end the run, and one line about each."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import ray
from ray.train import TrainingFailedError, UserCallback

from pipeline.cluster.spec import Cluster
from pipeline.credentials import redacted
from pipeline.errors import DataError, RequestError, one_line
from pipeline.store.path import run_path

if TYPE_CHECKING:
    # Ray Train's controller loads this module, and does without JAX.
    from pipeline.train.spec import RunSpec

# Maximum characters of an error in a line.
_MAX_CHARACTERS = 300
# The first error in a text of tracebacks, which caused the others.
_ERROR_LINE = re.compile(r"^\w[\w.]*(Error|Exception)\b.*", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class FailedAt:
    """The place and step at which a worker's function raised; travels as attribute ``failed_at`` of the exception.

    epoch: of the group of workers. step: the last that was begun. place: file and line. may_pass: whether a machine may
    have caused the error.
    """

    epoch: int
    step: int | None
    place: str
    may_pass: bool
    traceback: str

    def __str__(self) -> str:
        return self.place if self.step is None else f"{self.place}, step {self.step + 1}"


def in_words(error: BaseException) -> str:
    """An error on one line: the project's own by their message, others with their kind before it."""
    if isinstance(error, ray.exceptions.RayTaskError) and (cause := _ERROR_LINE.search(str(error))):
        return cause[0].strip()[:_MAX_CHARACTERS]
    message, kind = one_line(error), type(error).__name__
    if isinstance(error, DataError | RequestError) or message == kind:
        return message
    return f"{kind}: {message}"[:_MAX_CHARACTERS]


def own_error(failure: BaseException | None) -> DataError | RequestError | None:
    """The project's own error inside what Ray wrapped around it."""
    while failure is not None and not isinstance(failure, DataError | RequestError):
        failure = getattr(failure, "cause", None) or failure.__cause__
    return failure


def _failed_at(failure: BaseException) -> FailedAt | None:
    """None for Ray's errors, of processes that died or do not answer."""
    return getattr(failure, "failed_at", None)


class FailureWatch(UserCallback):
    """Ends the run at failures that a restart would only repeat, and has every other one reported in a line.

    The first kind are the project's own errors, of data or request, and bugs: the same error in the same place at the
    same step twice in a row. At all others Ray starts the workers again.
    """

    def __init__(self, coordinator: Any, run_dir: str):
        self._coordinator = coordinator
        self._run_dir = run_dir
        # The bugs of the last failure, and the group of workers that had them.
        self._bugs: set[tuple] = set()
        self._epoch = -1

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, BaseException]) -> None:
        """Called by Ray at each look at a group of workers that has failed, also more than once a group."""
        for error in filter(None, map(own_error, worker_exceptions.values())):
            raise error
        self._check_repeats(worker_exceptions)
        line = f"workers {sorted(worker_exceptions)} failed; {_root_cause(worker_exceptions)}\n"
        ray.get(self._coordinator.lost.remote(line))

    def _check_repeats(self, failures: dict[int, BaseException]) -> None:
        marks = {rank: _failed_at(failure) for rank, failure in failures.items()}
        bugs, epoch = {}, -1
        # If a process died, the errors of the others may follow from that.
        if None not in marks.values():
            epoch = max(at.epoch for at in marks.values())
            bugs = {
                (in_words(failures[rank]), at.place, at.step): rank for rank, at in marks.items() if not at.may_pass
            }
        again = self._bugs & set(bugs)
        if again and epoch != self._epoch:
            rank = bugs[again.pop()]
            path = _write(self._run_dir, marks[rank].traceback)
            raise DataError(
                f"{_line_on(rank, failures[rank])}: the same error twice in a row, so starting the workers again does "
                f"not help; this is a bug in the code. All of it: {path}"
            )
        self._bugs, self._epoch = set(bugs), epoch


def _root_cause(failures: dict[int, BaseException]) -> str:
    """A line on the failure that explains the others: first of a process that died, then a bug, then a lost peer."""

    def order(rank: int) -> tuple[bool, bool, int]:
        at = _failed_at(failures[rank])
        return at is not None, at is not None and at.may_pass, rank

    rank = min(failures, key=order)
    return _line_on(rank, failures[rank])


def _line_on(rank: int, failure: BaseException) -> str:
    at = _failed_at(failure)
    return f"rank {rank}: {in_words(failure)}" + (f" ({at})" if at else "")


def raise_failure(error: TrainingFailedError, spec: RunSpec, cluster: Cluster) -> NoReturn:
    """Raises the project's own error inside ``error``, or DataError on workers that failed too often."""
    failures = getattr(error, "worker_failures", {})
    controller = getattr(error, "controller_failure", None)
    if own := next(filter(None, map(own_error, [controller, *failures.values()])), None):
        raise own from error
    path = _write(spec.run_dir, "".join(traceback.format_exception(error)))
    if controller is not None and not failures:
        what = f"Ray Train's controller failed: {in_words(controller)}"
    else:
        last = f"; the last: {_root_cause(failures)}" if failures else ""
        what = f"the workers failed more than cluster.max_failures = {cluster.max_failures} times{last}"
    newest = spec.open_checkpoints().latest_step or "none"
    raise DataError(
        f"{what}. All of it: {path}. The newest whole checkpoint is {newest}; run the same command again to go on from "
        "it"
    ) from error


def raise_lost_ray(error: ray.exceptions.RayError, spec: RunSpec) -> NoReturn:
    """Raises DataError on processes of Ray's own that were lost: its head, a raylet, an actor of the run."""
    path = _write(spec.run_dir, "".join(traceback.format_exception(error)))
    newest = spec.open_checkpoints().latest_step or "none"
    raise DataError(
        f"processes of Ray were lost: {in_words(error)}. All of it: {path}. The newest whole checkpoint is {newest}; "
        "run the same command again to go on from it"
    ) from error


def _write(run_dir: str, text: str) -> Path:
    """Keeps Ray's whole message in a file."""
    path = run_path(run_dir) / "failure.txt"
    with contextlib.suppress(OSError):
        path.write_text(redacted(text), encoding="utf-8")
    return path
