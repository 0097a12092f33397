"""The data of a checkpoint beside the state."""

from __future__ import annotations

import base64
import collections
import dataclasses
import math
from collections.abc import Callable

from pipeline.data.media.machine import cpu_kind
from pipeline.train.checkpoint import Checkpoints
from pipeline.train.mixture.schedule import Schedule
from pipeline.train.reject_limit import RejectCounts
from pipeline.train.spec import RunSpec


@dataclasses.dataclass(frozen=True)
class Best:
    """The checkpoint with the best score so far. metric: DATA_SET/TASK/METRIC of an evaluation's entries."""

    metric: str
    step: int
    score: float

    @classmethod
    def of(cls, metric: str, step: int, entries: list[dict]) -> Best | None:
        """The score of a step; None where the entries have none that is finite."""
        for entry in entries:
            value = entry["metrics"].get(metric.removeprefix(f"{entry['dataset']}/{entry['task']}/"))
            if value is not None and math.isfinite(value):
                return cls(metric, step, value)
        return None

    def beats(self, other: Best | None) -> bool:
        """Whether this one takes the other's place; of equals the earlier stays."""
        if other is None or other.metric != self.metric:
            return True
        lower = self.metric.endswith("rank")
        return self.score < other.score if lower else self.score > other.score


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
        self._best = Best(**stored["best"]) if stored.get("best") else None
        self._latest: Best | None = None
        self.non_finite = collections.Counter(stored.get("non_finite", {}))
        # Data sets that left the recipe may return, and go on where they were.
        classes = {name: list(d.classes) for name, d in spec.data.data_sets.items()}
        self._lasting = {
            "classes": stored.get("classes", {}) | classes,
            "fingerprints": stored.get("fingerprints", {}) | spec.data.fingerprints,
        }

    def evaluated(self, step: int, entries: list[dict]) -> None:
        """Takes the entries of an evaluation after ``step`` updates: the score of that step's checkpoint."""
        metric = self._spec.checkpoints.keep_best
        self._latest = Best.of(metric, step, entries) if metric else None

    def _best_after(self, step: int) -> Best | None:
        """The best checkpoint once that of ``step`` is saved; None if none is wanted."""
        metric, latest = self._spec.checkpoints.keep_best, self._latest
        if latest and latest.step == step and latest.beats(self._best):
            self._best = latest
        return self._best if self._best and self._best.metric == metric else None

    def save(self, step: int, state: dict) -> None:
        """Saves the state after ``step`` updates; it may change once this returns."""
        non_finite = {task: count for task, count in self.non_finite.items() if count}
        best = self._best_after(step)
        data = self._lasting | {
            "config": self._spec.recipe,
            "position": dataclasses.asdict(self._schedule.position_at(step)),
            "samples": self._schedule.positions_before(step),
            "non_finite": non_finite,
            "best": dataclasses.asdict(best) if best else None,
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
