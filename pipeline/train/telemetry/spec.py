"""What a run writes and shows, as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class LoggingSpec:
    """``logging.*`` of a recipe.

    progress: "auto", "rich", "plain" or "none". log_every: steps between two lines of metrics.jsonl. writers: names in
    ``writers.WRITERS``. project: the project under which they file the run. profile_steps: (first, last) to trace.
    peak_flops: FLOP/s of one device; None: looked up by the kind of device. feed_advice: task → what to raise if the
    run waits for that task's data.
    """

    progress: str = "auto"
    progress_every_s: float = 10.0
    log_every: int = 1
    log_samples: bool = False
    writers: tuple[str, ...] = ()
    project: str = "imp"
    profile_steps: tuple[int, int] | None = None
    peak_flops: float | None = None
    feed_advice: Mapping[str, str] = dataclasses.field(default_factory=dict)
