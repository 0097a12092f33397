"""The records and the display of a run, as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from pipeline.train.telemetry.settings import LoggingSettings


@dataclasses.dataclass(frozen=True)
class LoggingSpec(LoggingSettings):
    """``logging.*`` of a recipe, with the other settings of what is written.

    writers: names in ``writers.WRITERS``. log_every: steps between two lines of metrics.jsonl. log_samples: the ids of
    every batch are written. evaluator: "package.module:name" of an ``evaluations.EvaluatorMaker``. feed_advice: task →
    advice if the run waits for that task's data.
    """

    writers: tuple[str, ...] = ()
    log_every: int = 1
    log_samples: bool = False
    evaluator: str = ""
    feed_advice: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def peak_flops(self) -> float | None:
        """FLOP/s of one device; None: looked up by the kind of device."""
        return self.peak_tflops and self.peak_tflops * 1e12
