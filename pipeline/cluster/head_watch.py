"""Ends a run whose Ray has lost its head: without it the workers train on for a minute, then Ray ends all of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import ray

from pipeline.cluster import ray_private
from pipeline.commands import typed_command
from pipeline.errors import EXIT_RUN_AGAIN, DataError
from pipeline.stopping import Stop, end_process
from pipeline.train.spec import RunSpec
from pipeline.waiting import say

# Seconds between two looks.
_EVERY_S = 0.5
# Seconds for which the head of a cluster that was joined may be away: it may be started again. Ray waits for 60.
_AWAY_S = 35.0
# Seconds for the last save, within those that Ray waits.
_SAVE_S, _SAVE_JOINED_S = 50.0, 20.0


class HeadWatch:
    """Looks out for the head of Ray inside the block.

    Once it is lost, the run is asked to stop, and the process ends as after any other stop when the state is saved.
    last: the number of updates after which the run stops, None while that is not known; may raise Ray's errors.
    """

    def __init__(self, stop: Stop, spec: RunSpec, *, joined: bool, last: Callable[[], int | None]) -> None:
        self._stop = stop
        self._spec = spec
        self._away_s, self._save_s = (_AWAY_S, _SAVE_JOINED_S) if joined else (0.0, _SAVE_S)
        self._last = last
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="head", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        seen = time.monotonic()
        while not self._ended.wait(_EVERY_S):
            if ray_private.head_answers():
                seen = time.monotonic()
            elif time.monotonic() - seen >= self._away_s:
                return self._end()

    def _end(self) -> None:
        say("the head of Ray was lost: saving the state and stopping")
        self._stop.ask()
        deadline = time.monotonic() + self._save_s
        while not (saved := self._saved()) and time.monotonic() < deadline:
            time.sleep(0.1)
        newest = self._newest() or "none"
        state = f"after step {newest}, state saved" if saved else f"the newest whole checkpoint is {newest}"
        say(f"stopped as the head of Ray was lost, {state}; go on with: {typed_command()}")
        end_process(EXIT_RUN_AGAIN)

    def _saved(self) -> bool:
        """Whether the state after the last step is saved."""
        try:
            last = self._last()
        except ray.exceptions.RayError:
            return False
        return last is not None and (self._newest() or 0) >= last

    def _newest(self) -> int | None:
        try:
            return self._spec.open_checkpoints().latest_step
        except DataError:
            return None
