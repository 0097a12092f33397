"""The sections of a report that show where the time went."""

from __future__ import annotations

import datetime
import itertools
import math
from collections.abc import Callable

import numpy as np

from pipeline.report.charts import COLORS, line_chart, smooth_line
from pipeline.report.elements import Html, duration, escape, fixed, grid, percent, right, table
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
    "decode": "batches that were not decoded yet",
    "transfer": "decoded batches on their way from other machines",
    "batch": "batches being put together",
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
    colors = {name: f"var(--c{index % COLORS})" for index, name in enumerate(_PARTS)}
    colors |= {"other": "var(--quiet)", "down": "var(--rule)"}
    swatch = '<i class="swatch" style="background:{}"></i>'
    # A command that was killed at once took no time.
    up_s, wall_s = max(life.up_s, 1e-9), max(life.wall_s, 1e-9)
    rows = [
        (
            Html(swatch.format(colors[name]) + escape(_PARTS[name])),
            right(duration(spent)),
            percent(spent / up_s) if name != "down" else right("–"),
            percent(spent / wall_s),
        )
        for name, spent in parts.items()
    ]
    for name, spent in {"attempts": life.up_s, "first command to last sign of life": life.wall_s}.items():
        share = percent(spent / up_s) if name == "attempts" else right("–")
        rows.append((Html(f"<b>{name}</b>"), right(duration(spent)), share, percent(spent / wall_s)))
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
    return out + _slowest_ranks(life)


def _slowest_ranks(life: Goodput) -> str:
    """The ranks that waited longest for their own data, and for which stage most."""
    ranks = []
    for rank, waited_s in itertools.islice(life.slowest_ranks.items(), _MAX_RANKS):
        stage, most_s = max(life.rank_waits_s[rank].items(), key=lambda item: item[1], default=("", 0.0))
        most = f"{_STAGES.get(stage, stage)}, {duration(most_s)}" if most_s else "–"
        ranks.append((f"rank {rank}", right(duration(waited_s)), most))
    return table(("Ranks that waited longest", "For their own data", "Most of it for"), ranks) if ranks else ""


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
        keys = ("step_s", "data_wait_s", "examples", "tokens")
        step_s, wait_s, examples, tokens = (median(run.metrics.series(key, task=name).values) for key in keys)
        known = known or any(map(math.isfinite, (step_s, wait_s, examples, tokens)))
        rows.append((name, fixed(1000 * step_s), fixed(1000 * wait_s), examples, tokens))
    columns = ("Task", "Step, ms", "Wait for data, ms", "Examples a step", "Tokens a step")
    return Html("<h3>Medians per task</h3>" + table(columns, rows)) if known else Html("")


def _speed(run: Run) -> Html:
    """Tokens per second and, if the devices' peak is known, their utilization over the run."""
    charts = [
        _speed_chart(run, "tokens_per_s", title="Tokens a second", form=_thousands, of_median="{:,.0f}".format),
        _speed_chart(run, "mfu", title="Model FLOPs utilisation", form="{:.1%}".format, of_median="{:.1%}".format),
    ]
    return grid(filter(None, charts)) if any(charts) else Html("")


def _thousands(value: float) -> str:
    return f"{value / 1000:,.4g} k" if abs(value) >= 1000 else f"{value:.4g}"


def _speed_chart(
    run: Run, key: str, *, title: str, form: Callable[[float], str], of_median: Callable[[float], str]
) -> Html:
    series = run.metrics.series(key)
    if not np.isfinite(series.values).any():
        return Html("")
    note = f"median {of_median(median(series.values))}"
    return line_chart(
        [smooth_line(title, series)], title=title, note=note, x_end=run.metrics.last_step, form=form, zero=True
    )


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
        memory = number(item.get("memory_bytes")) / 2**20
        rows.append((task, variant, number(item.get("vision_tokens")), number(steps), fixed(memory), fixed(spent)))
    waited = number(mapping(run.summary.get("time")).get("compile_wait_s"))
    behind = f", in the background; steps waited {duration(waited)} for it" if math.isfinite(waited) else ""
    note = f"<p>{len(found)} compiled steps: {duration(float(np.nansum(compile_s)))} of compiling{behind}.</p>"
    columns = ("Task", "Variant", "Vision tokens", "Steps", "Memory, MiB", "Compile, s")
    return Html(note + _plan(run) + table(columns, rows))


def _plan(run: Run) -> Html:
    """What was said before the first step, and the memory as compiled."""
    plan = mapping(run.summary.get("plan"))
    lines = [line for line in plan.get("lines") or [] if isinstance(line, str)]
    needed, limit = number(plan.get("needed_bytes")), number(plan.get("limit_bytes"))
    if needed > 0 and limit > 0:
        lines.append(
            f"as compiled: the state and the largest step take {needed / 2**30:.3g} of {limit / 2**30:.3g} GiB"
        )
    return Html("".join(f"<p>{escape(line)}</p>" for line in lines))
