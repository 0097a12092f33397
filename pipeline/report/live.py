"""The report of a run that is under way: written again after a checkpoint, by a process of the lowest priority."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import one_line
from pipeline.report.report import write_report
from pipeline.store.path import run_path

# Seconds between two looks at the checkpoints.
_POLL_S = 2.0
# Minimum time between two reports as a multiple of the time that the last one took: of a long run that is minutes.
_REST = 50


@contextlib.contextmanager
def live_report(run_dir: Path) -> Iterator[None]:
    """Keeps report.html up to date while the block runs. Nothing that fails here reaches the block."""
    ended = threading.Event()
    # Looked at before the block, or its first checkpoint might be taken for an old one.
    seen = _checkpoints(run_path(run_dir))
    thread = threading.Thread(target=_keep, args=(run_path(run_dir), ended, seen), name="live report", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _keep(run_dir: Path, ended: threading.Event, seen: frozenset[str]) -> None:
    not_before = 0.0
    while not ended.wait(_POLL_S):
        if (found := _checkpoints(run_dir)) == seen or time.monotonic() < not_before:
            continue
        seen, began = found, time.monotonic()
        with contextlib.suppress(OSError):
            _write(run_dir, ended)
        not_before = time.monotonic() + _REST * (time.monotonic() - began)


def _checkpoints(run_dir: Path) -> frozenset[str]:
    """The names of the whole checkpoints: ``run.json`` is put there last."""
    return frozenset(path.parent.name for path in (run_dir / "checkpoints").glob("*/run.json"))


def _write(run_dir: Path, ended: threading.Event) -> None:
    """In a process of its own: a million lines take half a minute, which the driver's threads do not have."""
    package = Path(__file__).resolve().parent.parent.parent
    path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "pipeline.report", str(run_dir)]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, start_new_session=True, **quiet) as process:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, process.pid, 19)
        while process.poll() is None:
            if ended.wait(0.1):
                process.kill()


def report_so_far(run_dir: Path) -> None:
    """Writes the report of a run that was stopped or has failed; a line if that is not possible."""
    try:
        write_report(run_dir)
    except Exception as e:
        # The run has its own outcome, which this must not hide.
        print(f"warning: no report could be written: {one_line(e)}", file=sys.stderr, flush=True)
