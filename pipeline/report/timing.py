"""The sections of a report that show where the time went."""

from __future__ import annotations

import math

import numpy as np

from pipeline.report.elements import (
    COLORS,
    NEUTRAL,
    Html,
    curve,
    duration,
    escape,
    figure,
    fixed,
    grid,
    percent,
    right,
    table,
)
from pipeline.report.learning import SMALL_POINTS, steps_axis
from pipeline.report.run_files import Run, median
from pipeline.report.values import mapping, number, records

# Key of summary.json → name of this part of the total time.
_PARTS = {
    "corpus_s": "corpus",
    "start_s": "start",
    "compile_s": "compile",
    "data_wait_s": "waiting for data",
    "steps_s": "steps",
    "save_s": "checkpoints",
    "evaluation_s": "evaluation",
}


def time(run: Run) -> Html:
    """The section of the parts of the total time, the medians of each task, and the speed over the steps."""
    times = {name: number(value) for name, value in mapping(run.summary.get("time")).items()}
    total = times.pop("total_s", math.nan)
    first_step = times.pop("first_step_s", math.nan)
    parts = {_PARTS.get(name, name.removesuffix("_s")): spent for name, spent in times.items() if spent > 0}
    rest = total - sum(parts.values())
    if rest > 0.001 * total:
        parts["other"] = rest
    content = _parts(parts, total=total, first_step=first_step) if parts else ""
    if rest < -0.001 * total:
        content += "<p class='quiet'>Parts that ran side by side add up to more than the total.</p>"
    return Html(content + _step_times(run) + _speed(run))


def _parts(parts: dict[str, float], *, total: float, first_step: float) -> str:
    """A bar of the parts, and a table that is also its legend."""
    colors = {name: COLORS[index % len(COLORS)] for index, name in enumerate(parts)} | {"other": NEUTRAL}
    swatch = '<i class="swatch" style="background:{}"></i>'
    named = {Html(swatch.format(colors[name]) + escape(name)): spent for name, spent in parts.items()}
    named |= {Html("<b>total</b>"): total, "first step done after": first_step}
    whole = total if total > 0 else sum(parts.values())
    rows = [(name, right(duration(spent)), percent(spent / whole)) for name, spent in named.items()]
    return _time_bar(parts, colors) + table(("Part", "Time", "Of the total"), rows)


def _time_bar(parts: dict[str, float], colors: dict[str, str]) -> Html:
    """A stacked bar without a chart library: it needs no axis."""
    piece = '<i style="flex:{:.6g} 0 0;background:{}" title="{}: {}"></i>'
    pieces = (piece.format(spent, colors[name], escape(name), duration(spent)) for name, spent in parts.items())
    return Html(f'<div class="stack">{"".join(pieces)}</div>')


def _step_times(run: Run) -> Html:
    rows, known = [], False
    for name in run.tasks:
        step_s, wait_s = (median(run.metrics.values(key, task=name)[1]) for key in ("step_s", "data_wait_s"))
        examples, tokens = (median(run.metrics.values(key, task=name)[1]) for key in ("examples", "tokens"))
        known = known or any(map(math.isfinite, (step_s, wait_s, examples, tokens)))
        rows.append((name, fixed(1000 * step_s), fixed(1000 * wait_s), examples, tokens))
    columns = ("Task", "Step, ms", "Wait for data, ms", "Examples a step", "Tokens a step")
    return Html("<h3>Medians per task</h3>" + table(columns, rows)) if known else Html("")


def _speed(run: Run) -> Html:
    """Tokens per second and, if the devices' peak is known, their utilization over the run."""
    charts = [
        *_speed_chart(run, "tokens_per_s", title="Tokens a second", tick_format="~s", median_format=",.0f"),
        *_speed_chart(run, "mfu", title="Model FLOPs utilisation", tick_format=".0%", median_format=".1%"),
    ]
    return grid(charts) if charts else Html("")


def _speed_chart(run: Run, key: str, *, title: str, tick_format: str, median_format: str) -> list[Html]:
    steps, values = run.metrics.values(key)
    if not np.isfinite(values).any():
        return []
    return [
        figure(
            curve(steps, values, name=title, limit=SMALL_POINTS),
            height=230,
            title=title,
            note=f"median {format(median(values), median_format)}",
            xaxis=steps_axis(run),
            yaxis={"tickformat": tick_format, "rangemode": "tozero"},
        )
    ]


def structures(run: Run) -> Html:
    """The section of the compiled steps."""
    found = records(run.summary.get("structures"))
    if not found:
        return Html("")
    compile_s = [number(item.get("compile_s")) for item in found]
    rows = []
    for item, spent in zip(found, compile_s, strict=True):
        task, variant = (str(item.get(key, "–")) for key in ("task", "variant"))
        steps = mapping(run.task(str(item.get("task"))).get("variants")).get(str(item.get("variant")))
        rows.append((task, variant, number(item.get("vision_tokens")), number(steps), fixed(spent)))
    note = f"<p>{len(found)} compiled steps; {duration(float(np.nansum(compile_s)))} of compile time in all.</p>"
    return Html(note + table(("Task", "Variant", "Vision tokens", "Steps", "Compile, s"), rows))
