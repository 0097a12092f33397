"""The shape budget: every graph that a run may compile, with its size, listed before the first step."""

from __future__ import annotations

import dataclasses

from model import sizes
from model.config import ModelConfig
from model.structure import Structure
from pipeline.train.mixture.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Budget:
    """One (task, variant). tokens: of a global batch, of all modalities; vision_tokens: of it. flops: of a training
    step on all devices (``sizes.structure_flops``). memory_bytes: an estimate (``sizes.structure_memory``), of which
    gradient_bytes and activation_bytes (the batch too) are the step's alone. share: of the steps to come.
    """

    task: str
    variant: str
    structure: Structure
    batch_size: int
    tokens: int
    vision_tokens: int
    flops: int
    memory_bytes: int
    gradient_bytes: int
    activation_bytes: int
    share: float


def shape_budget(schedule: Schedule, config: ModelConfig) -> list[Budget]:
    """Every (task, variant) of a schedule, in the recipe's order."""
    found = {}
    for structure in schedule.structures.values():
        if structure not in found:
            found[structure] = (sizes.structure_flops(config, structure), sizes.structure_memory(config, structure))
    return [
        Budget(
            task,
            variant,
            structure,
            batch_size=structure.global_batch_size,
            tokens=structure.num_tokens,
            vision_tokens=structure.global_batch_size
            * sum(i.num_tokens for i in structure.inputs if i.modality == "vision"),
            flops=found[structure][0],
            memory_bytes=sum(found[structure][1].values()),
            gradient_bytes=found[structure][1]["gradients"],
            activation_bytes=found[structure][1]["activations"] + found[structure][1]["batch"],
            share=schedule.share(task) / len(schedule.tasks[task].variants),
        )
        for (task, variant), structure in schedule.structures.items()
    ]


def table(budget: list[Budget]) -> str:
    """The list as aligned text."""
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
    lines = [f"shape budget: {graphs} graphs for {len(budget)} inputs (memory of a step: estimates)"]
    for row in (head, *rows):
        cells = [text.ljust(w) if i < 2 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)
