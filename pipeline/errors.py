"""The two ways a run ends early that are not bugs, and the exit codes of every job."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.credentials import redacted

# Names that a line lists before it says how many more there are.
_MOST_NAMED = 4
EXIT_DONE, EXIT_FAILED, EXIT_REQUEST, EXIT_RUN_AGAIN = 0, 1, 2, 75


class _Told(Exception):
    """An error whose text people read, and which then stands in logs: without the credentials of the URIs it names."""

    def __init__(self, message: str = ""):
        super().__init__(redacted(str(message)))


class RequestError(_Told):
    """What was asked for is wrong: one line that says what was expected, what was found, what to do. Exit code 2."""


class DataError(_Told):
    """The data stopped the run (too many rejects, storage out of reach): the message names the source. Exit code 1."""


def one_line(error: BaseException, *, limit: int | None = None) -> str:
    """An error's message on one line, cut after ``limit`` characters; the error's type if it has no message."""
    return (" ".join(str(error).split()) or type(error).__name__)[:limit]


def some_of(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
