"""A few processes that render media files.

They are plain child processes, not ``multiprocessing`` ones: fork is unsafe once the caller has threads (jax and ray
start some), and spawn would import the caller's main module, jax included, in every worker.
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

# Maximum number of files in one request.
_MAX_CHUNK = 32


class Pool:
    """Worker processes, started at the first use and ended with the ``with`` block."""

    def __init__(self, *, num_processes: int):
        self._num_processes = num_processes
        self._workers: list[subprocess.Popen] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.kill()
            worker.communicate()

    def run(self, jobs: list[dict], *, root: Path, set_name: str, advance: Callable[[int], None]) -> None:
        """Renders the files of ``jobs``. advance: called from several threads with numbers of completed files."""
        if not jobs:
            return
        size = min(_MAX_CHUNK, -(-len(jobs) // (2 * self._num_processes)))
        common = {"root": str(root), "set": set_name}
        chunks = collections.deque(common | {"jobs": jobs[start : start + size]} for start in range(0, len(jobs), size))
        num_needed = min(self._num_processes, len(chunks))
        self._workers += [_start_worker() for _ in range(num_needed - len(self._workers))]
        with ThreadPoolExecutor(num_needed) as threads:
            futures = [threads.submit(_feed, worker, chunks, advance) for worker in self._workers[:num_needed]]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                # Leaves the threads without work, so that the error or Ctrl-C does not wait for the whole set.
                chunks.clear()
                raise


def _feed(worker: subprocess.Popen, chunks: collections.deque, advance: Callable[[int], None]) -> None:
    """Gives a worker one chunk after the other until none is left."""
    while True:
        try:
            request = chunks.popleft()
        except IndexError:
            return
        answer = _ask(worker, request)
        if "error" in answer:
            raise RuntimeError(f"demo corpus: could not build {answer['error']}")
        advance(answer["done"])


def _ask(worker: subprocess.Popen, request: dict) -> dict:
    try:
        worker.stdin.write(json.dumps(request) + "\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
    except BrokenPipeError:
        line = ""
    if not line:
        first, last = request["jobs"][0]["path"], request["jobs"][-1]["path"]
        raise RuntimeError(
            f"demo corpus: a worker process ended (exit code {worker.wait()}) somewhere between {first} and {last}; "
            "completed files are kept: run again to continue"
        )
    return json.loads(line)


def _start_worker() -> subprocess.Popen:
    """Starts a worker with the import path of this process."""
    project = Path(__file__).resolve().parents[3]
    search_path = os.pathsep.join([str(project), *(entry for entry in sys.path if entry)])
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "pipeline.data.demo.render_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **one_thread, "PYTHONPATH": search_path},
    )
