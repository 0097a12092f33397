"""The frame of every command: one-line errors and exit codes."""

from __future__ import annotations

import argparse
import contextlib
import errno
import sys
from collections.abc import Callable

from pipeline import stopping
from pipeline.cli.output import lasting_output
from pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEST, OUT_OF_REACH, DataError, RequestError, one_line
from pipeline.files import ensure_home
from pipeline.store.objects import StoreError

Job = Callable[[argparse.Namespace, stopping.Stop], int]

# Errors of a disk that takes no more: full, over a quota, a limit of file size, read-only.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# What is to be done about an error of the storage.
_REMEDIES = dict.fromkeys(_FULL, "free some space or mend the storage") | dict.fromkeys(
    (*OUT_OF_REACH, errno.EIO), "mend the storage or its permissions"
)
_REMEDIES |= {
    errno.ENAMETOOLONG: "name a shorter path",
    errno.ELOOP: "mend the link",
    errno.EMFILE: "raise the limit (ulimit -n)",
}


def run_job(job: Job, arguments: argparse.Namespace) -> int:
    """Runs a job and turns its ways of ending into an exit code and at most one line."""
    code = EXIT_FAILED
    try:
        with lasting_output() as output, stopping.obeyed("stopped; run the same command again") as stop:
            code = _run_job(job, arguments, stop)
            if (fault := output.fault()) and code == EXIT_DONE:
                _say(f"failed: the output could not be written: {one_line(fault)}; all else is done")
                code = EXIT_FAILED
            return code
    finally:
        stopping.bound_end(code)


def _run_job(job: Job, arguments: argparse.Namespace, stop: stopping.Stop) -> int:
    try:
        ensure_home()
        return job(arguments, stop)
    except RequestError as e:
        _say(f"error: {e}")
        return EXIT_REQUEST
    except DataError as e:
        _say(f"failed: {e}")
        return EXIT_FAILED
    except StoreError as e:
        refused = e.refused
        _say(f"{'error' if refused else 'failed'}: {e}" + ("" if refused else "; run the same command again"))
        return EXIT_REQUEST if refused else EXIT_FAILED
    except OSError as e:
        # An error without a file is of something else: a socket, a process.
        if e.errno not in _REMEDIES or (e.errno in OUT_OF_REACH and not e.filename):
            raise
        _say(f"failed: {one_line(e)}; {_REMEDIES[e.errno]}, and run the same command again")
        return EXIT_FAILED
    finally:
        # Jobs that need no Ray do not load it.
        if "pipeline.cluster.start" in sys.modules:
            sys.modules["pipeline.cluster.start"].end_ray()


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)
