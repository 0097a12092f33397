"""The report of a run: one page, made from the files of the run directory, that shows in a minute how the run went."""

import math
from collections import Counter
from pathlib import Path

import numpy as np

from pipeline.files import write_bytes
from pipeline.report import learning, page
from pipeline.report.experts import experts
from pipeline.report.page import COLORS, NEUTRAL, Html, percent, table
from pipeline.report.run_files import (
    Run,
    first_and_last_tenth,
    listed,
    mapping,
    median,
    number,
    read_run,
    records,
    shares,
    steps_done,
)

MAX_REJECTS = 100
SWATCH = '<i class="swatch" style="background:{}"></i>'
STATES = {"complete": "good", "not finished": "bad", "not known": "quiet"}
TIME_PARTS = {
    "corpus_s": "corpus",
    "start_s": "start",
    "compile_s": "compile",
    "data_wait_s": "waiting for data",
    "steps_s": "steps",
    "save_s": "checkpoints",
    "evaluation_s": "evaluation",
}


def write_report(run_dir: Path) -> Path:
    """Writes `run_dir/report.html` atomically and returns its path; a section without content says "not available"."""
    run_dir = Path(run_dir)
    run = read_run(run_dir)
    sections = {name: section(run) for name, section in SECTIONS.items()}
    text = page.page(title=f"IMP run: {run_dir.resolve().name}", header=header(run), sections=sections)
    write_bytes(run_dir / "report.html", text.encode(errors="replace"))
    return run_dir / "report.html"


def header(run: Run) -> Html:
    done, planned = steps_done(run), number(mapping(run.config.get("train")).get("num_steps"))
    parameters = number(run.summary.get("num_parameters"))
    logged_s = run.values("wall_s")[1]
    wall_s = number(mapping(run.summary.get("time")).get("total_s"))
    wall_s = float(np.nanmax(logged_s)) if math.isnan(wall_s) and np.isfinite(logged_s).any() else wall_s
    examples = np.nansum([number(run.task(name).get("examples")) for name in run.tasks])
    state = "not known" if math.isnan(planned) else "complete" if done >= planned else "not finished"
    facts = {
        "State": Html(f'<span class="{STATES[state]}">{state}</span>'),
        "Steps": f"{done:,}" + ("" if math.isnan(planned) else f" of {planned:,.0f}"),
        "Model": str(mapping(run.config.get("model")).get("variant", "–")),
        "Parameters": "–" if math.isnan(parameters) else f"{parameters / 1e6:,.1f} M",
        "Wall time": page.duration(wall_s),
        "Tasks": str(len(run.tasks)),
        "Examples": f"{examples:,.0f}" if examples else "–",
        "Workers": str(run.summary.get("world_size", "–")),
    }
    notes = [f'<li class="{"bad" if bad else "good"}">{page.escape(text)}</li>' for text, bad in findings(run)]
    return Html(page.tiles(facts) + (f'<ul class="findings">{"".join(notes)}</ul>' if notes else ""))


def findings(run: Run) -> list[tuple[str, bool]]:
    """What a reader should see first: each a sentence, and whether it is bad news."""
    if not run.metrics:
        return [("No step was logged.", True)]
    found = []
    tenths = {name: first_and_last_tenth(run.values("loss", task=name)[1]) for name in run.tasks}
    guessing = learning.losses_at_chance(run)
    fell = [name for name, (first, last) in tenths.items() if last < first and name not in guessing]
    found.append((f"Loss fell on {len(fell)} of {len(run.tasks)} tasks.", len(fell) < len(run.tasks)))
    if guessing:
        found.append((f"Loss still at chance: {', '.join(f'{n} ({c:.4g})' for n, c in guessing.items())}.", True))
    lost = [row["task"] for row in run.metrics if not math.isfinite(number(row.get("loss")))]
    if lost:
        found.append((f"Losses that are not finite: {len(lost):,}, in {', '.join(dict.fromkeys(lost))}.", True))
    skipped = number(run.summary.get("skipped_updates"))
    if skipped > 0:
        found.append((f"Updates skipped because they were not finite: {skipped:,.0f}.", True))
    outside = [name for name, (share, sigma, actual) in shares(run).items() if abs(actual - share) > 3 * sigma]
    if outside:
        found.append((f"More than 3 sigma off their share of the steps: {', '.join(outside)}.", True))
    if guessed := learning.at_chance(run):
        found.append((f"Not better than chance: {', '.join(guessed)}.", True))
    counts = [mapping(item) for item in mapping(run.summary.get("rejects")).values()]
    drawn, rejected = (np.nansum([number(item.get(key)) for item in counts]) for key in ("drawn", "rejected"))
    if rejected > 0:
        found.append((f"Samples rejected: {rejected:,.0f} of {drawn:,.0f}.", rejected > 0.01 * drawn))
    alarms = [(row["step"], str(text)) for row in run.metrics for text in listed(row.get("alarms"))]
    if alarms:
        step, text = alarms[0]
        found.append((f"Alarms: {len(alarms):,}; the first at step {step:,.0f}: {text}.", True))
    step_s, wait_s = (np.nansum(run.values(key)[1]) for key in ("step_s", "data_wait_s"))
    if step_s > 0 and wait_s > 0.1 * (step_s + wait_s):
        found.append((f"Waiting for data took {wait_s / (step_s + wait_s):.0%} of the logged time.", True))
    return found


def time(run: Run) -> Html:
    times = {name: number(value) for name, value in mapping(run.summary.get("time")).items()}
    total = times.pop("total_s", math.nan)
    first_step = times.pop("first_step_s", math.nan)
    parts = {TIME_PARTS.get(name, name.removesuffix("_s")): spent for name, spent in times.items() if spent > 0}
    rest = total - sum(parts.values())
    if rest > 0.001 * total:
        parts["other"] = rest
    content = ""
    if parts:
        colors = {name: COLORS[index % len(COLORS)] for index, name in enumerate(parts)} | {"other": NEUTRAL}
        named = {Html(SWATCH.format(colors[name]) + page.escape(name)): spent for name, spent in parts.items()}
        named |= {Html("<b>total</b>"): total, "first step done after": first_step}
        whole = total if total > 0 else sum(parts.values())
        rows = [(name, page.right(page.duration(spent)), percent(spent / whole)) for name, spent in named.items()]
        content = time_bar(parts, colors) + table(("Part", "Time", "Of the total"), rows)
    if rest < -0.001 * total:
        content += "<p class='quiet'>Parts that ran side by side add up to more than the total.</p>"
    return Html(content + step_times(run) + speed(run))


def speed(run: Run) -> Html:
    """Tokens a second, and the utilisation of the devices where their peak is known, over the run."""
    charts = []
    for key, title, form in (("tokens_per_s", "Tokens a second", "~s"), ("mfu", "Model FLOPs utilisation", ".0%")):
        steps, values = run.values(key)
        if np.isfinite(values).any():
            note, axis = f"median {format(median(values), '.1%' if key == 'mfu' else ',.0f')}", {"tickformat": form}
            traces = page.curve(steps, values, name=title, limit=learning.SMALL_POINTS)
            charts.append(page.figure(
                traces, height=230, title=title, note=note, xaxis=learning.steps_axis(run),
                yaxis=axis | {"rangemode": "tozero"},
            ))  # fmt: skip
    return page.grid(charts) if charts else Html("")


def time_bar(parts: dict[str, float], colors: dict[str, str]) -> Html:
    """A stacked bar without a chart library: it needs no axis, and its legend is the table below it."""
    piece = '<i style="flex:{:.6g} 0 0;background:{}" title="{}: {}"></i>'
    pieces = (
        piece.format(spent, colors[name], page.escape(name), page.duration(spent)) for name, spent in parts.items()
    )
    return Html(f'<div class="stack">{"".join(pieces)}</div>')


def step_times(run: Run) -> Html:
    rows, known = [], False
    for name in run.tasks:
        step_s, wait_s = (median(run.values(key, task=name)[1]) for key in ("step_s", "data_wait_s"))
        examples, tokens = (median(run.values(key, task=name)[1]) for key in ("examples", "tokens"))
        known = known or any(map(math.isfinite, (step_s, wait_s, examples, tokens)))
        rows.append((name, page.fixed(1000 * step_s), page.fixed(1000 * wait_s), examples, tokens))
    columns = ("Task", "Step, ms", "Wait for data, ms", "Examples a step", "Tokens a step")
    return Html("<h3>Medians per task</h3>" + table(columns, rows)) if known else Html("")


def structures(run: Run) -> Html:
    found = records(run.summary.get("structures"))
    if not found:
        return Html("")
    compile_s = [number(item.get("compile_s")) for item in found]
    rows = [
        (str(item.get("task", "–")), str(item.get("variant", "–")), number(item.get("vision_tokens")),
         number(variants(run, item).get(str(item.get("variant")))), page.fixed(spent))
        for item, spent in zip(found, compile_s, strict=True)
    ]  # fmt: skip
    note = f"<p>{len(found)} compiled steps; {page.duration(float(np.nansum(compile_s)))} of compile time in all.</p>"
    return Html(note + table(("Task", "Variant", "Vision tokens", "Steps", "Compile, s"), rows))


def variants(run: Run, structure: dict) -> dict:
    return mapping(run.task(str(structure.get("task"))).get("variants"))


def data(run: Run) -> Html:
    rejects = mapping(run.summary.get("rejects"))
    tasks: dict[str, list[str]] = {name: [] for name in [*mapping(run.config.get("data_sets")), *rejects]}
    for name in run.tasks:
        tasks.setdefault(run.data_set(name), []).append(name)
    rows = []
    for data_set, users in tasks.items():
        size = max((number(run.task(name).get("rows")) for name in users), default=math.nan)
        examples = float(np.nansum([number(run.task(name).get("examples")) for name in users]))
        drawn, rejected = (number(mapping(rejects.get(data_set)).get(key)) for key in ("drawn", "rejected"))
        share = rejected / drawn if drawn > 0 else math.nan
        epochs = examples / size if size > 0 else math.nan
        counts = size, examples, page.fixed(epochs, ".2f"), drawn, rejected, page.fixed(share, ".2%")
        rows.append((data_set, ", ".join(users), *counts))
    columns = ("Data set", "Tasks", "Rows", "Examples used", "Times through", "Drawn", "Rejected", "Share")
    return Html((table(columns, rows) if rows else "") + rejected_samples(run))


def rejected_samples(run: Run) -> Html:
    if run.rejects is None:
        return Html("<p class='quiet'>List of rejects: not available.</p>") if run.tasks else Html("")
    if not run.rejects:
        return Html("<p class='quiet'>Nothing was rejected.</p>")
    reasons = Counter((str(row.get("data_set")), str(row.get("reason"))) for row in run.rejects)
    columns = ("id", "data_set", "source", "reason", "task", "step")
    first = run.rejects[:MAX_REJECTS]
    rows = [["–" if row.get(key) is None else str(row[key]) for key in columns] for row in first]
    shown = f"The first {len(rows)} of {len(run.rejects):,}" if len(run.rejects) > len(rows) else f"All {len(rows)}"
    return Html(
        "<h3>Reasons</h3>"
        + table(("Data set", "Reason", "Rejects"), [(*reason, count) for reason, count in reasons.most_common(20)])
        + f"<h3>{shown} rejects</h3>"
        + table(("Id", "Data set", "Source", "Reason", "Task", "Step"), rows)
    )


def config(run: Run) -> Html:
    if not run.config_text.strip():
        return Html("")
    return Html(f"<details><summary>config.yaml</summary><pre>{page.escape(run.config_text)}</pre></details>")


SECTIONS = {
    "Evaluation": learning.evaluation,
    "Loss": learning.loss,
    "Mixture": learning.mixture,
    "Schedules": learning.schedules,
    "Experts": experts,
    "Time": time,
    "Structures": structures,
    "Data": data,
    "Config": config,
}
