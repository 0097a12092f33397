"""The process that renders media files: ``python -m pipeline.data.demo.render_worker``, started by ``pool``.

Reads one JSON object per line, {"root", "set", "jobs"}, and answers each with {"done": count} or {"error": traceback}.
It ends with its input, so it does not outlive a parent that was killed.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path

from pipeline.data.demo.corpus_files import write_whole

_MODULES = {"digits": "digits", "emoji": "emoji", "moving_digits": "moving"}


def _handle(request: dict) -> dict:
    """Renders and writes the files of one request."""
    render = importlib.import_module(f"pipeline.data.demo.{_MODULES[request['set']]}").render
    for job in request["jobs"]:
        try:
            write_whole(Path(request["root"]) / job["path"], render(job))
        except Exception:
            return {"error": f"{job['path']}\n{traceback.format_exc()}"}
    return {"done": len(request["jobs"])}


def main() -> None:
    """Answers requests from stdin until it closes."""
    # Ctrl-C goes to the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Answers get a separate descriptor: a library that prints must not break the protocol.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        try:
            print(json.dumps(_handle(json.loads(line))), file=answers, flush=True)
        except BrokenPipeError:
            # The parent is gone; a normal exit would flush into the closed pipe and fail again.
            os._exit(1)


if __name__ == "__main__":
    main()
