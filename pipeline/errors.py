"""The two ways a run ends early that are not bugs, and the exit codes of every job."""

from __future__ import annotations

import errno
from collections.abc import Iterable

from pipeline.credentials import redacted

# Maximum number of names that a line lists before it says how many more there are.
_MAX_NAMES = 4

# Errors of storage that shows no file to this user, whatever is in it: permissions, a mount that is gone.
OUT_OF_REACH = (errno.EACCES, errno.EPERM, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT)

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_REQUEST = 2
EXIT_RUN_AGAIN = 75


class _UserError(Exception):
    """An error whose text is shown and logged: credentials in the URIs that it names are hidden."""

    def __init__(self, message: str = ""):
        super().__init__(redacted(str(message)))


class RequestError(_UserError):
    """The request is wrong: one line that says what was expected, what was found, what to do. Exit code 2."""


class DataError(_UserError):
    """The data stopped the run (too many rejects, storage out of reach): the message names the source. Exit code 1."""


def one_line(error: BaseException, *, limit: int | None = None) -> str:
    """An error's message on one line, cut after ``limit`` characters; the error's type if it has no message."""
    return (" ".join(str(error).split()) or type(error).__name__)[:limit]


def some_of(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
