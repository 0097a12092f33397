"""The data of a checkpoint beside the state."""

from __future__ import annotations

import base64
import collections
import dataclasses
from collections.abc import Callable

from pipeline.data.media.machine import cpu_kind
from pipeline.train.checkpoint import Checkpoints
from pipeline.train.mixture.schedule import Schedule
from pipeline.train.reject_limit import RejectCounts
from pipeline.train.spec import RunSpec


class Saver:
    """Saves the state with the position, the class lists, the tokenizer and the recipe.

    stored: the data of the checkpoint that the run goes on from; empty at the start of a run. non_finite: task → its
    latest consecutive updates that were not finite, kept up to date by the loop. rejects_before: step → the draws and
    rejects of all processes for the steps before it.
    """

    def __init__(
        self,
        spec: RunSpec,
        schedule: Schedule,
        checkpoints: Checkpoints,
        *,
        stored: dict,
        rejects_before: Callable[[int], RejectCounts],
    ) -> None:
        self._spec = spec
        self._schedule = schedule
        self._checkpoints = checkpoints
        self._rejects_before = rejects_before
        self.non_finite = collections.Counter(stored.get("non_finite", {}))
        # Data sets that left the recipe may return, and go on where they were.
        classes = {name: list(d.classes) for name, d in spec.data.data_sets.items()}
        self._lasting = {
            "classes": stored.get("classes", {}) | classes,
            "fingerprints": stored.get("fingerprints", {}) | spec.data.fingerprints,
        }

    def save(self, step: int, state: dict) -> None:
        """Saves the state after ``step`` updates; it may change once this returns."""
        non_finite = {task: count for task, count in self.non_finite.items() if count}
        data = self._lasting | {
            "config": self._spec.recipe,
            "position": dataclasses.asdict(self._schedule.position_at(step)),
            "samples": self._schedule.positions_before(step),
            "non_finite": non_finite,
            "rejects": self._rejects_before(step).as_dict(),
            "cpu_kind": cpu_kind(),
            "tokenizer": base64.b64encode(self._spec.data.tokenizer or b"").decode(),
        }
        self._checkpoints.save(step, state=state, data=data, finite=not non_finite)


def other_machine(stored: dict) -> list[str]:
    """A warning if samples may decode to other bits than before the checkpoint. stored: the checkpoint's data."""
    then = stored.get("cpu_kind")
    if then is None or then == cpu_kind():
        return []
    return [
        f"warning: the checkpoint is from another kind of machine, on which some media decode to other bits, so losses "
        f"may differ from those on that machine. There: {then}. Here: {cpu_kind()}"
    ]
