"""The names of the project's commands, as whoever started this process can type them."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from pipeline.credentials import redacted

# Scripts of a clone; an installed package is without them.
_JOBS = Path(__file__).resolve().parent.parent / "jobs"


def command(name: str) -> str:
    """``imp check`` where the installed command runs, ``python jobs/check.py`` in a clone.

    Processes that neither started (Ray's workers, a notebook) go by which of the two exists.
    """
    started = Path(sys.argv[0])
    if started.parent.name == "jobs" and started.suffix == ".py":
        folder = started.parent
    elif not _is_imp(started) and _JOBS.is_dir():
        folder = Path(_JOBS.name)
    else:
        return f"imp {name}"
    script, *arguments = ["preprocess", "import"] if name == "import" else [name]
    return shlex.join(["python", str(folder / f"{script}.py"), *arguments])


def typed_command() -> str:
    """The command line that this process was started with, without the credentials of URIs: logs keep it."""
    program = ["imp"] if _is_imp(Path(sys.argv[0])) else ["python", sys.argv[0]]
    return redacted(shlex.join([*program, *sys.argv[1:]]))


def _is_imp(program: Path) -> bool:
    return program.stem == "imp"
