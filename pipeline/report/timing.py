"""The sections of a report that show where the time went."""

from __future__ import annotations

import datetime
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
from pipeline.train.goodput import Goodput

# Part of a run's time → its name.
_PARTS = {
    "steps": "steps",
    "data": "waiting for data",
    "compile": "waiting for the compiler",
    "start": "starts",
    "save": "saves",
    "evaluate": "evaluations between steps",
    "lost": "steps run again",
    "end": "last saves, evaluation, report",
    "other": "other",
    "down": "between attempts",
}
# Stage of the waits for data → its name.
_STAGES = {
    "sampler": "the sampler's choice of a task",
    "stream": "decoding, and batches on their way here",
    "journal": "the journal of rejects",
    "devices": "arrays on their way to the devices",
    "ranks": "other ranks, which had no batch yet",
}
# Minimum share of the time at which a part is shown.
_SHOWN = 0.0005
# Maximum number of attempts, the latest, and of ranks, those that waited longest, in a table.
_MAX_ATTEMPTS, _MAX_RANKS = 20, 8


def time(run: Run) -> Html:
    """The section of where the time of all attempts went, the medians of each task, and the speed over the steps."""
    life = run.goodput
    content = "" if life is None else _life(life) + _data_waits(life) + _attempts(life)
    return Html(content + _step_times(run) + _speed(run))


def _life(life: Goodput) -> str:
    """A bar of the parts, and a table that is also its legend."""
    parts = {name: spent for name, spent in life.parts_s.items() if spent > _SHOWN * life.wall_s}
    parts |= {"down": life.down_s} if life.down_s else {}
    colors = {name: COLORS[index % len(COLORS)] for index, name in enumerate(_PARTS)}
    colors |= {"other": NEUTRAL, "down": "var(--rule)"}
    swatch = '<i class="swatch" style="background:{}"></i>'
    rows = [
        (
            Html(swatch.format(colors[name]) + escape(_PARTS[name])),
            right(duration(spent)),
            percent(spent / life.up_s) if name != "down" else right("–"),
            percent(spent / life.wall_s),
        )
        for name, spent in parts.items()
    ]
    for name, spent in {"attempts": life.up_s, "first command to last sign of life": life.wall_s}.items():
        share = percent(spent / life.up_s) if name == "attempts" else right("–")
        rows.append((Html(f"<b>{name}</b>"), right(duration(spent)), share, percent(spent / life.wall_s)))
    columns = ("Part", "Time", "Of the attempts", "Of the whole time")
    named = {_PARTS[name]: (spent, colors[name]) for name, spent in parts.items()}
    return _time_bar(named) + table(columns, rows)


def _data_waits(life: Goodput) -> str:
    """What was waited for, by stage and rank, and what to do about it."""
    waits = {name: spent for name, spent in life.waits_s.items() if spent > _SHOWN * life.wall_s}
    if not waits:
        return ""
    whole = life.parts_s["data"] + life.parts_s["steps"]
    rows = [(_STAGES.get(name, name), right(duration(spent)), percent(spent / whole)) for name, spent in waits.items()]
    out = "<h3>Waits for data</h3>" + table(("Waiting for", "Time", "Of steps and their waits"), rows)
    if life.advice:
        out += f"<p>Waiting: {escape(life.advice)}.</p>"
    slowest = sorted(life.rank_waits_s, key=lambda rank: -life.rank_waits_s[rank])[:_MAX_RANKS]
    ranks = [(f"rank {rank}", right(duration(life.rank_waits_s[rank]))) for rank in slowest]
    return out + (table(("Ranks that waited longest", "For their own data"), ranks) if ranks else "")


def _attempts(life: Goodput) -> str:
    """The latest attempts: when they ran, over which steps, and how they ended."""
    if len(life.attempts) < 2:
        return ""
    latest = list(enumerate(life.attempts, 1))[-_MAX_ATTEMPTS:]
    rows = [
        (
            str(number),
            f"{datetime.datetime.fromtimestamp(a.began_at, datetime.UTC):%Y-%m-%d %H:%M:%S}",
            right(duration(a.seen_at - a.began_at)),
            str(a.facts.get("world_size", "–")),
            "–" if a.start_step is None else f"{a.start_step:,} to {a.last_step:,}",
            a.outcome or "killed, or still runs",
        )
        for number, a in latest
    ]
    note = f"<p>{life.lost_steps:,} steps were run again.</p>" if life.lost_steps else ""
    columns = ("Attempt", "Began (UTC)", "Time", "Workers", "Steps", "How it ended")
    return "<h3>Attempts</h3>" + note + table(columns, rows)


def _time_bar(parts: dict[str, tuple[float, str]]) -> Html:
    """A stacked bar without a chart library: it needs no axis. parts: name → (seconds, color)."""
    piece = '<i style="flex:{:.6g} 0 0;background:{}" title="{}: {}"></i>'
    pieces = (piece.format(spent, color, escape(name), duration(spent)) for name, (spent, color) in parts.items())
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
