"""The keys of ``logging.*``."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pipeline.keys import FromOne, key


@dataclasses.dataclass(frozen=True)
class LoggingSettings:
    """The display and the records of a run beside its metrics.jsonl; a resume may change it."""

    progress: Literal["auto", "rich", "plain", "none"] = key(
        "auto", 'Display: a live panel ("rich"), lines ("plain") or nothing; "auto" is the panel on a terminal.'
    )
    evaluate_every: int | None = key(
        None, "Steps between two evaluations while the run trains, which change nothing of it; null: none.", ge=1
    )
    evaluate_rows: int = key(
        256, "Maximum rows of each of those measurements, and rows that it learns from; always the same sample.", ge=2
    )
    progress_every_s: float = key(10.0, "Seconds between two plain lines.", gt=0)
    writers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] | None = key(
        None, "Services that also receive the metrics; null: TensorBoard if it is installed."
    )
    project: str = key("imp", "Name under which wandb and mlflow file the run.", min_length=1)
    profile_steps: tuple[FromOne, FromOne] | None = key(None, "[first, last] of the steps to trace with jax.profiler.")
    peak_tflops: float | None = key(
        None, "TFLOP/s that one device can reach, for its utilisation (mfu); null: by its kind.", gt=0
    )
