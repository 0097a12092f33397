"""The keys of ``sampler.*`` that the samplers use as they are."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pipeline.keys import key

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
class ShareSettings:
    """How weights become shares of the steps."""

    kind: Literal[KINDS] = key(
        "multinomial",
        '"multinomial" draws tasks in proportion to their weights; "uniform" all alike; "round_robin" runs a task when '
        'a counter is a multiple of its interval; "exact" gives each task its share of every period of steps; '
        '"bandit" draws more of what is not learned yet.',
    )
    temperature: float = key(1.0, "Weights are raised to 1 / temperature: above 1 evens them out.", gt=0)
    max_weight: float | None = key(None, "Larger weights (numbers of examples) count as this.", gt=0)
    max_share: float | None = key(None, "Maximum share of the steps of a task.", gt=0, le=1)
    variant_weight: Literal["split", "full"] = key(
        "split", "A task's weight is split over its variants, or each of them has it in full."
    )
