"""Where a command runs: its line, the project's commit, the machine. Kept with a run, so that it can be run again."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from pathlib import Path

from pipeline import __version__
from pipeline.commands import typed_command
from pipeline.host_memory import machine_bytes, machine_cpus

# Seconds that git may take.
_GIT_S = 10


def provenance() -> dict[str, str]:
    """Plain values for people: command, commit, host, python, platform, cpus, memory."""
    return {
        "command": typed_command(),
        "commit": _commit(),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "cpus": f"{machine_cpus():g} of {os.cpu_count()}",
        "memory": f"{machine_bytes() / 1e9:.0f} GB",
    }


def _commit() -> str:
    """The commit of a clone, with a note if files differ from it; the version of an installed package."""
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return f"imp {__version__}, installed"
    commit = _git(folder, "rev-parse", "--short=12", "HEAD")
    if not commit:
        return f"imp {__version__}, unknown commit"
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit + (" with changes that are not committed" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=_GIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
