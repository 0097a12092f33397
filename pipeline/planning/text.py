"""A plan for people, and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from model.structure import Structure
from pipeline.planning.run_plan import Assumptions, RunPlan, TaskStep
from pipeline.planning.structures import StepPlan
from pipeline.planning.timed_step import Measured
from pipeline.train.accelerators import PRICED
from pipeline.train.memory_fit import MARGIN
from pipeline.train.memory_need import gib


def as_json(plan: RunPlan, assumptions: Assumptions, measured: dict[Structure, Measured]) -> dict[str, Any]:
    """Everything as plain values; NaN as None."""
    found = dataclasses.asdict(plan) | {"device_days": plan.device_days, "price": plan.price, "priced": PRICED}
    if measured:
        found["measured"] = [
            {"task": step.task, "variant": step.variant} | dataclasses.asdict(measured[step.structure])
            for step in _each(plan)
            if step.structure in measured
        ]
    return _plain(found | {"assumptions": dataclasses.asdict(assumptions)})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(plan: RunPlan, assumptions: Assumptions) -> str:
    """The plan in lines."""
    lines = [_machine_line(plan), "", *_step_table(_each(plan))]
    left = sum(s.plan is None for s in plan.steps)
    if left:
        lines.append(f"  and {left} smaller inputs, by their FLOPs at the rate of these (--all plans every one)")
    return "\n".join([*lines, "", *_run_lines(plan, assumptions)])


def _machine_line(plan: RunPlan) -> str:
    device = plan.machine.device
    peak = f", {device.peak_flops / 1e12:,.0f} TFLOP/s of bfloat16" if device.peak_flops else ""
    return (
        f"{plan.machine.num_devices} x {device.kind}: {device.memory_bytes / 2**30:.2f} GiB{peak} "
        f"({plan.machine.name}), {plan.num_steps:,} steps"
    )


def _step_table(steps: list[TaskStep]) -> list[str]:
    parts = ("state", "gradients", "activations")
    head = ("input", "batch", "memory", *parts, "step", "links", "TFLOPs", "traced", "collectives")
    rows = []
    for step in steps:
        p = step.plan
        assert p is not None
        rows.append(
            (
                f"{step.task} {step.variant}",
                f"{step.structure.global_batch_size:,}",
                f"{p.memory['peak'] / 2**30:.2f} GiB" + (" !" if p.problem else ""),
                *(f"{p.memory[part] / 2**30:.2f}" for part in parts),
                f"{p.step_s:.3f} s",
                f"{p.link_s:.3f} s",
                f"{p.flops / 1e12:,.1f}",
                f"x {p.traced_flops / p.flops:.2f}",
                _collectives(p),
            )
        )
    return _aligned(head, rows) + _scope_lines(steps)


def _each(plan: RunPlan) -> list[TaskStep]:
    """The steps that were planned, one of each structure."""
    return list({step.structure: step for step in reversed(plan.steps) if step.plan}.values())[::-1]


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, the first column and the last to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    ends, lines = (0, len(head) - 1), []
    for row in (head, *rows):
        cells = [t.ljust(w) if i in ends else t.rjust(w) for i, (t, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def comparison(plan: RunPlan, measured: dict[Structure, Measured]) -> list[str]:
    """The planned figures beside the measured ones."""
    head = ("measured", "memory", "planned", "off by", "step", "planned", "off by")
    rows = []
    for step in _each(plan):
        p, found = step.plan, measured.get(step.structure)
        if p is None or found is None:
            continue
        planned = p.memory["peak"] - p.memory["program"]
        memory = found.memory_bytes
        rows.append(
            (
                f"{step.task} {step.variant}",
                "?" if memory is None else gib(memory),
                gib(planned),
                "?" if memory is None else f"{planned / memory - 1:+.1%}",
                f"{found.step_s:.4g} s",
                f"{p.step_s:.4g} s",
                f"{p.step_s / found.step_s - 1:+.1%}",
            )
        )
    return ["", *_aligned(head, rows)] if rows else []


def _collectives(plan: StepPlan) -> str:
    parts = [f"{kind} {size / 2**30:.2f} GiB" for kind, (_, size) in sorted(plan.collectives.items())]
    tokens = plan.gathered_token_bytes
    return ", ".join(parts) + (f" (gathers {tokens / 2**30:.2f} GiB of tokens!)" if tokens else "")


def _scope_lines(steps: list[TaskStep]) -> list[str]:
    lines = []
    for scopes in {id(s.structure): s.plan.scopes for s in steps if s.plan and s.plan.scopes}.values():
        largest = sorted(scopes.items(), key=lambda item: -item[1])[:6]
        lines.append("  cycles: " + ", ".join(f"{name} {share:.0%}" for name, share in largest))
    return lines[:1]


def _run_lines(plan: RunPlan, assumptions: Assumptions) -> list[str]:
    limit = plan.machine.device.memory_bytes
    compiled = all(s.plan is None or s.plan.source == "compiler" for s in plan.steps)
    source = "by the compiler" if compiled else f"by arithmetic at {assumptions.utilization:.0%} of the peak"
    fits = "fits" if plan.fits else f"DOES NOT FIT: {plan.advice}"
    price = (
        ""
        if plan.price is None
        else (f", ${plan.price:,.0f} at ${plan.machine.device.price}/h a device ({PRICED}; --prices FILE replaces it)")
    )
    used = "" if math.isnan(plan.utilization) else f", {plan.utilization:.1%} of the peak"
    return [
        f"memory:      {plan.peak_bytes / 2**30:.2f} of {limit / 2**30:.2f} GiB a device, "
        f"{_parts(plan.memory)}; {fits} (margin {MARGIN:.0%})",
        f"time:        {_days(plan.days)} ({source}{used}), {plan.device_days:,.1f} device-days{price}",
        f"FLOPs:       {plan.flops:.3g} in all; the programs' products are {plan.traced_over_analytic:.2f} times that",
        f"decoding:    {plan.decode_cpus:,.0f} CPUs, {plan.input_bytes_s / 1e6:,.0f} MB/s into the devices",
        f"checkpoints: {plan.checkpoint_bytes / 1e9:,.1f} GB each, {plan.save_s:.0f} s to save; every "
        f"{plan.save_every_s / 60:.0f} min by Young's rule",
        f"goodput:     {plan.goodput:.1%} at a failure every {assumptions.hours_between_failures:g} h",
    ]


def _parts(memory: dict[str, int]) -> str:
    return ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items() if name != "peak")


def _days(days: float) -> str:
    if days >= 2:
        return f"{days:.1f} days"
    return f"{24 * days:.1f} hours" if days >= 1 / 12 else f"{1440 * days:.0f} minutes"
