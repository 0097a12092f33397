"""The sections of a report that say what was learned: evaluation, losses, the mixture, schedules."""

import math

import numpy as np

from pipeline.report import page
from pipeline.report.page import COLORS, NEUTRAL, Html, percent, table
from pipeline.report.run_files import Run, first_and_last_tenth, mapping, number, shares
from pipeline.train.chance import is_guess

SMALL_POINTS = 500  # per trace in the small charts: 25 tasks of them stay under a megabyte


def verdict(value: float, chance: float, num_examples: float) -> Html:
    """Above chance only where binomial noise (2 sigma of `num_examples` guesses) would not explain the difference."""
    if math.isnan(chance) or math.isnan(value):
        return Html("")
    noise = 2 * math.sqrt(chance * (1 - chance) / num_examples) if 0 < chance < 1 and num_examples > 0 else 0.0
    if value > chance + noise:
        return Html(f'<span class="good">{f"{value / chance:.3g}× chance" if chance > 0 else "above chance"}</span>')
    return Html(f'<span class="bad">{"below" if value < chance - noise else "at"} chance</span>')


def at_chance(run: Run) -> list[str]:
    """The evaluation metrics that guessing would have reached too."""
    return [
        f"{result.get('dataset', '–')} {name}"
        for result in run.evaluations
        for name, value in mapping(result.get("metrics")).items()
        if "bad" in verdict(
            number(value), number(mapping(result.get("chance")).get(name)), number(result.get("num_examples"))
        )
    ]  # fmt: skip


def evaluation(run: Run) -> Html:
    rows = []
    for result in run.evaluations:
        chances, num_examples = mapping(result.get("chance")), number(result.get("num_examples"))
        for name, found in mapping(result.get("metrics")).items():
            value, chance = number(found), number(chances.get(name))
            tick = f'<b style="left:{100 * chance:.1f}%"></b>' if 0 <= chance <= 1 else ""
            meter = Html(f'<div class="meter"><i style="width:{100 * value:.1f}%"></i>{tick}</div>')
            shown = Html(f"<b>{page.format_number(value)}</b>")
            against = meter if 0 <= value <= 1 else "", chance, verdict(value, chance, num_examples)
            data_set, task = (str(result.get(key, "–")) for key in ("dataset", "task"))
            rows.append((data_set, name, shown, *against, task, num_examples))
    columns = ("Data set", "Metric", "Value", "0 to 1", "Chance", "Against chance", "Task", "Examples")
    note = "<p class='quiet'>The tick on a bar is chance. “At chance”: within two binomial sigma of it.</p>"
    return Html(note + table(columns, rows)) if rows else Html("")


def steps_axis(run: Run) -> dict:
    """The same steps in every chart, so that one can be read under the other."""
    return {"range": [0, max(1, run.metrics[-1]["step"])]}


def losses_at_chance(run: Run) -> dict[str, float]:
    """Task → the loss of guessing, of the tasks that end there. By rows: variants of other batches have other ones."""
    found = {}
    for name in run.tasks:
        rows = [r for r in run.rows.get(name, ()) if math.isfinite(number(r.get("chance")))]
        rows = rows[-max(1, len(rows) // 10) :]
        losses, chances = (np.array([number(r.get(key)) for r in rows]) for key in ("loss", "chance"))
        if len(rows) and np.isfinite(losses).any() and is_guess(float(np.nanmedian(losses / chances)), 1.0):
            found[name] = float(np.median(chances))
    return found


def loss(run: Run) -> Html:
    if not run.metrics:
        return Html("")
    charts, rows, guessing = [], [], losses_at_chance(run)
    for name in run.tasks:
        steps, values = run.values("loss", task=name)
        first, last = first_and_last_tenth(values)
        change = percent((last - first) / abs(first) if first else math.nan)
        change = Html('<span class="bad">at chance</span>') if name in guessing else change
        chance = first_and_last_tenth(run.values("chance", task=name)[1])[1]
        lost = int(np.sum(~np.isfinite(values)))
        rows.append((name, first, last, change, len(values), lost, chance, objective(run, name)))
        charts.append(page.figure(
            page.curve(steps, values, name=name, limit=SMALL_POINTS), height=190, bar=False, title=name,
            note=f"{page.format_number(first)} → {page.format_number(last)}", xaxis=steps_axis(run),
        ))  # fmt: skip
    columns = ("Task", "First tenth", "Last tenth", "Change", "Logged", "Not finite", "Chance", "Objective")
    note = "<p class='quiet'>Dots: logged losses. Line: running median. Numbers: medians of first and last tenth.</p>"
    return Html(note + page.grid(charts) + table(columns, rows) + loss_terms(run))


def objective(run: Run, name: str) -> str:
    """A task's objective in a few words: "nce", or "nce + 0.5 softmax" of a weighted sum."""
    found = run.recipe(name).get("objective", "–")
    terms = mapping(found)
    return " + ".join(t if w == 1 else f"{w} {t}" for t, w in terms.items()) if terms else str(found)


def loss_terms(run: Run) -> Html:
    """What losses of several terms are made of, before weighting."""
    rows = []
    for name in run.tasks:
        for term in dict.fromkeys(key for row in run.rows.get(name, ()) for key in mapping(row.get("losses"))):
            first, last = first_and_last_tenth(run.values("losses", term, task=name)[1])
            rows.append((name, term, first, last))
    return Html("<h3>Terms</h3>" + table(("Task", "Term", "First tenth", "Last tenth"), rows)) if rows else Html("")


def mixture(run: Run) -> Html:
    found = shares(run)
    if not found:
        return Html("")
    places, names = np.arange(len(found)), list(found)
    expected, sigma, actual = (np.array(column) for column in zip(*found.values(), strict=True))
    bar = {"type": "bar", "orientation": "h", "y": places, "hovertemplate": "%{x:.2%}"}
    band = {"type": "data", "array": 2 * sigma, "color": NEUTRAL, "thickness": 2, "width": 5}
    grey = {"color": NEUTRAL, "opacity": 0.55}
    chart = page.figure(
        [
            {**bar, "x": actual, "name": "actual", "marker": {"color": COLORS[0]}},
            {**bar, "x": expected, "name": "expected ± 2σ", "marker": grey, "error_x": band},
        ],
        height=90 + 34 * len(names), barmode="group", bargap=0.3, showlegend=True, hovermode="y unified",
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "traceorder": "normal"},
        xaxis={"tickformat": ".0%", "rangemode": "tozero"},
        yaxis={"tickvals": places, "ticktext": [page.label(name) for name in names], "autorange": "reversed"},
    )  # fmt: skip
    inside, outside = Html("inside"), Html('<span class="bad">outside</span>')
    rows = [
        (name, percent(share), percent(real), inside if abs(real - share) <= 2 * spread else outside,
         number(run.task(name).get("steps")), number(run.task(name).get("examples")), run.data_set(name))
        for name, (share, spread, real) in found.items()
    ]  # fmt: skip
    return Html(chart + table(("Task", "Expected", "Actual", "2σ band", "Steps", "Examples", "Data set"), rows))


def schedules(run: Run) -> Html:
    charts = []
    steps, rates = page.thin(*run.values("learning_rate"))
    if len(steps):
        axis = {"exponentformat": "e"}
        line = {"type": "scatter", "mode": "lines", "x": steps, "y": rates, "line": {"color": COLORS[0], "width": 2.5}}
        charts.append(page.figure([line], height=230, title="Learning rate", xaxis=steps_axis(run), yaxis=axis))
    steps, norms = run.values("grad_norm")
    if np.isfinite(norms).any():
        low, high = np.nanmin(norms), np.nanmax(norms)
        scale = "log" if low > 0 else "linear"
        axis = {"type": scale, **({"dtick": "D2"} if low > 0 and high < 1000 * low else {})}
        traces = page.curve(steps, norms, name="gradient norm", color=COLORS[1])
        charts.append(
            page.figure(traces, height=230, title="Gradient norm", note=scale, xaxis=steps_axis(run), yaxis=axis)
        )
    pairs = [(pair, *page.thin(*run.values("temperatures", pair))) for pair in run.keys("temperatures")]
    if pairs:
        traces = [
            {"type": "scatter", "mode": "lines", "x": x, "y": y, "name": page.label(pair),
             "line": {"color": COLORS[index % len(COLORS)], "width": 2.5}}
            for index, (pair, x, y) in enumerate(pairs)
        ]  # fmt: skip
        charts.append(page.figure(traces, height=230, title="Temperatures", showlegend=True, xaxis=steps_axis(run)))
    return page.grid(charts) if charts else Html("")
