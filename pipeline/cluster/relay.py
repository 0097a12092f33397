"""Passes stop requests from the driver to its workers, and their printed lines back."""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import ray

from pipeline.cluster.spec import Cluster
from pipeline.commands import typed_command
from pipeline.errors import EXIT_FAILED, EXIT_RUN_AGAIN
from pipeline.stopping import Stop, end_process
from pipeline.train.spec import RunSpec
from pipeline.train.step_coordinator import News
from pipeline.waiting import say, waiting_for

# Seconds for an answer of the step coordinator, on a machine that may be busy.
_ANSWER_S = 10.0
# Seconds for its answer at a signal, whose sender waits.
_STOP_ANSWER_S = 2.0
# Seconds for a line to arrive.
_FLUSH_S = 2.0


class Relay:
    """Passes a stop to the workers, and their lines to the terminal.

    Ray's own log monitor would print the lines of every process of the machines. Ends the process if a stop is
    requested while no worker has anything to save, or if none has started in time: Ray waits for machines without a
    limit, and saved state stays saved.
    """

    def __init__(self, coordinator: Any, stop: Stop, *, spec: RunSpec, cluster: Cluster):
        self._coordinator = coordinator
        self._stop = stop
        self._spec = spec
        self._cluster = cluster
        self._ended = threading.Event()
        self._asked = False
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="relay", daemon=True)

    def __enter__(self) -> None:
        self._wait = contextlib.ExitStack()
        self._announce_wait(False)
        self._stop.has_state = self._trains
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._stop.has_state = lambda: False
        self._ended.set()
        self._thread.join()
        self._wait.close()

    def _trains(self) -> bool:
        """Whether the workers have a step to save: the last news may be older than their first one."""
        try:
            return ray.get(self._coordinator.trains.remote(), timeout=_STOP_ANSWER_S)
        # A stop is obeyed whatever Ray does.
        except Exception:
            return False

    def _watch(self) -> None:
        while not self._ended.wait(0.2):
            self._pass_on()
        self._pass_on()

    def _pass_on(self) -> None:
        try:
            news = ray.get(self._coordinator.news.remote(), timeout=_ANSWER_S)
        except ray.exceptions.RayError:
            # The coordinator is gone or its machine busy; ``fit_workers`` is told of every failure.
            return
        for error, text in news.lines:
            # The terminal may be gone, and the run goes on.
            with contextlib.suppress(OSError, ValueError):
                print(text, end="", file=sys.stderr if error else sys.stdout, flush=True)
        if news.running != self._running:
            self._announce_wait(news.running)
        if not news.epoch and time.monotonic() - self._began > self._cluster.start_timeout_s:
            say(
                f"failed: no worker has started within cluster.start_timeout_s = {self._cluster.start_timeout_s:g} s; "
                "are its machines taken by another job?"
            )
            end_process(EXIT_FAILED)
        if news.steps:
            self._stop.defer()
        if news.saved is not None and news.saved < self._spec.mixture.num_steps:
            # Nothing interrupts a compile.
            say(f"stopped after step {news.saved}, state saved; go on with: {typed_command()}")
            end_process(EXIT_RUN_AGAIN)
        if self._stop.is_set():
            self._ask_for_a_stop(news)

    def _announce_wait(self, running: bool) -> None:
        """Announces the wait for workers; running ones announce their own waits."""
        self._running = running
        self._wait.close()
        if not running:
            self._wait.enter_context(waiting_for(f"{self._cluster.sizes[0]} workers to start", long=True))

    def _ask_for_a_stop(self, news: News) -> None:
        if not self._asked:
            self._asked = True
            self._coordinator.stop.remote()
            self._wait.enter_context(waiting_for("the workers to end their step and save"))
        if not news.running or not news.steps:
            newest = self._spec.open_checkpoints().latest_step or "none"
            say(f"stopped while no worker trained; the newest whole checkpoint is {newest}")
            end_process(EXIT_RUN_AGAIN)


@contextlib.contextmanager
def lines_to(coordinator: Any, *, rank: int) -> Iterator[None]:
    """Sends this process's output to the driver's terminal; of ranks other than 0 only stderr."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(_Lines(coordinator, error=True)))
        if rank == 0:
            stack.enter_context(contextlib.redirect_stdout(_Lines(coordinator, error=False)))
        yield


class _Lines(io.TextIOBase):
    """A stream whose text goes to the coordinator, line by line."""

    def __init__(self, coordinator: Any, *, error: bool):
        self._coordinator = coordinator
        self._error = error
        self._text = ""
        self._sent: ray.ObjectRef | None = None
        # Several threads print.
        self._lock = threading.RLock()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._lock:
            whole, newline, self._text = (self._text + text).rpartition("\n")
            if newline:
                self._sent = self._coordinator.print.remote(self._error, whole + newline)
        return len(text)

    def flush(self) -> None:
        """Waits until the last line has arrived: the process may be about to end itself."""
        if self._sent is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.wait([self._sent], timeout=_FLUSH_S)
            self._sent = None
