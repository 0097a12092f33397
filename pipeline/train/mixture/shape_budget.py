"""The shape budget: every graph that a run may compile and its cost, listed before the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from model import sizes
from model.config import ModelConfig
from model.structure import Structure
from pipeline.train.memory_need import whole_parts
from pipeline.train.mixture.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class GraphCost:
    """The cost of one (task, variant).

    tokens: of a global batch, all modalities together; vision_tokens: those of vision. flops: of a training step on all
    devices (``sizes.structure_flops``). memory_bytes: an estimate for one device (``sizes.structure_memory``). share:
    expected share of the steps to come.
    """

    task: str
    variant: str
    structure: Structure
    batch_size: int
    tokens: int
    vision_tokens: int
    flops: int
    memory_bytes: int
    share: float


def shape_budget(schedule: Schedule, config: ModelConfig, freeze: Sequence[str] = ()) -> list[GraphCost]:
    """Lists every (task, variant) of a schedule, in the recipe's order. freeze: groups that are not trained."""
    # Tasks may share a structure.
    flops = {s: sizes.structure_flops(config, s, freeze=freeze) for s in dict.fromkeys(schedule.structures.values())}
    memory = {structure: whole_parts(config, structure, tuple(freeze)) for structure in flops}
    return [
        GraphCost(
            task,
            variant,
            structure,
            batch_size=structure.global_batch_size,
            tokens=structure.num_tokens,
            vision_tokens=structure.global_batch_size
            * sum(i.num_tokens for i in structure.inputs if i.modality == "vision"),
            flops=flops[structure],
            memory_bytes=sum(memory[structure].values()),
            share=schedule.share(task) / len(schedule.tasks[task].variants),
        )
        for (task, variant), structure in schedule.structures.items()
    ]


def table(budget: list[GraphCost]) -> str:
    """Formats the list as aligned text."""
    head = ("task", "variant", "batch", "tokens", "GFLOPs", "memory", "share")
    rows = [
        (
            b.task,
            b.variant,
            f"{b.batch_size:,}",
            f"{b.tokens:,}",
            f"{b.flops / 1e9:,.1f}",
            f"{b.memory_bytes / 2**20:,.0f} MiB",
            f"{b.share:.1%}",
        )
        for b in budget
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    graphs = len({b.structure for b in budget})
    lines = [f"shape budget: {graphs} graphs for {len(budget)} inputs (estimated memory of a step)"]
    for row in (head, *rows):
        cells = [text.ljust(w) if i < 2 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)
