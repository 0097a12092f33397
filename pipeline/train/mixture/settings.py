"""The keys of ``sampler.*``."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from annotated_types import Ge

from pipeline.keys import FromOne, key

KINDS = ("multinomial", "uniform", "round_robin", "exact", "bandit")


@dataclasses.dataclass(frozen=True)
class BanditSettings:
    """The adaptive sampler: it draws more of the tasks whose loss is still large against their first one."""

    floor: float = key(0.02, "Minimum share of the steps of every task.", ge=0, lt=1)
    lag: int = key(32, "Steps between a loss and the first draw that it may affect, and the length of a round.", ge=8)
    gain: float = key(
        2.0, "Strength of the losses: a task at its first loss is drawn e^gain times as often as one at 0.", ge=0, le=20
    )


@dataclasses.dataclass(frozen=True)
class Stage:
    """Weights of tasks from a step on."""

    from_step: int = key(..., "First step of the stage.", ge=0)
    weights: dict[str, Annotated[float, Ge(0)]] = key(..., "Task to weight, in place of the tasks' own.", min_length=1)


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
    """The choice of each step's task; the paper's rule by default."""

    kind: Literal[KINDS] = key(
        "multinomial",
        '"multinomial" draws tasks in proportion to their weights; "uniform" all alike; "round_robin" runs a task when '
        'a counter is a multiple of its interval; "exact" gives each task its share of every period of steps; '
        '"bandit" draws more of what is not learned yet.',
    )
    temperature: float = key(1.0, "Weights are raised to 1 / temperature: above 1 evens them out.", gt=0)
    max_weight: float | None = key(None, "Maximum weight (number of examples) that counts.", gt=0)
    max_share: float | None = key(None, "Maximum share of the steps of a task.", gt=0, le=1)
    variant_weight: Literal["split", "full"] = key(
        "split", "A task's weight is split over its variants, or each of them has it in full."
    )
    intervals: dict[str, FromOne] = key({}, "Task to interval of round_robin, 1 for those not named.")
    period: int | None = key(None, "Steps of a period of exact; null: those of the run.", ge=1)
    stages: tuple[Stage, ...] = key(
        (), "Weights over time, for multinomial, e.g. [{from_step: 1000, weights: {a: 2, b: 0}}]."
    )
    ramp: bool = key(False, "Weights change linearly from one stage to the next.")
    bandit: BanditSettings = key(BanditSettings(), "Settings of the adaptive sampler.")
