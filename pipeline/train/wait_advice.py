"""What to do about the waits for data of a run, by the stage and the rank that were waited for longest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

# What is waited for besides the stages of making a batch (``feed.STAGES``): another rank that has none yet.
RANKS = "ranks"
# Minimum share of waiting in the time of steps at which something should be done about it.
_WORTH_ADVICE = 0.1
_ADVICE = {
    "transfer": "decoded batches come from other machines slowly: decode on more CPUs of the trainers' machines, or "
    "use a faster network",
    "batch": "batches are put together slowly: the trainers need more CPU (cluster.cpus_per_worker)",
    "sampler": "the sampler waits for losses before it can choose: a sampler that does not look at them needs no wait",
    "journal": "rejects are written slowly: mend the data, or keep the run directory on faster storage",
    "devices": "batches reach the devices slowly: look at the bus and at other work on this machine",
}


@dataclasses.dataclass(frozen=True)
class RankWaits:
    """One rank's waits. own_s: stage → seconds. task: whose data it waited for longest."""

    own_s: Mapping[str, float]
    task: str | None

    @property
    def stage(self) -> str:
        """The stage that it waited for longest."""
        return max(self.own_s, key=lambda stage: self.own_s[stage], default="")

    @property
    def total_s(self) -> float:
        return sum(self.own_s.values())

    def advice(self, by_task: Mapping[str, str]) -> str:
        """What to do about them. by_task: task → the advice for its decoding."""
        if self.stage in _ADVICE:
            return _ADVICE[self.stage]
        found = by_task.get(self.task or "")
        return f"most of it for decoded batches of {self.task}" + (f": {found}" if found else "")


def advice_on_waits(
    waits: RankWaits, ranks: Mapping[int, RankWaits], *, share: float, by_task: Mapping[str, str]
) -> str | None:
    """What to do about the waits for data, None where they are short.

    waits: of rank 0, for other ranks too. ranks: the waits of each for its own data. share: of the waits in the time of
    steps and waits.
    """
    if share <= _WORTH_ADVICE:
        return None
    if waits.stage != RANKS:
        return waits.advice(by_task)
    slowest = max(ranks, key=lambda rank: ranks[rank].total_s, default=None)
    if slowest is None or not ranks[slowest].total_s:
        return "one rank is slower than the others, and does not wait for data: look at its machine"
    return f"rank {slowest} waits longest for its own data; {ranks[slowest].advice(by_task)}"
