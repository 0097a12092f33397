"""The sections of a report that show what was learned: evaluation and losses."""

from __future__ import annotations

import math

import numpy as np

from pipeline.report.elements import Html, curve, figure, format_number, grid, percent, table
from pipeline.report.run_files import Run, first_and_last_tenth, last_tenth
from pipeline.report.values import mapping, number
from pipeline.train.chance import is_guess

# Maximum number of points per trace of a small chart: 25 tasks stay under a megabyte.
SMALL_POINTS = 500


def _verdict(value: float, chance: float, num_examples: float) -> tuple[str, str]:
    """(CSS class, text) of a metric beside chance; both empty if either is unknown.

    Above chance only if binomial noise (2 sigma of ``num_examples`` guesses) does not explain the difference.
    """
    if math.isnan(chance) or math.isnan(value):
        return "", ""
    noise = 2 * math.sqrt(chance * (1 - chance) / num_examples) if 0 < chance < 1 and num_examples > 0 else 0.0
    if value > chance + noise:
        return "good", f"{value / chance:.3g}× chance" if chance > 0 else "above chance"
    return "bad", f"{'below' if value < chance - noise else 'at'} chance"


def at_chance(run: Run) -> list[str]:
    """The evaluation metrics that guessing would have reached too."""
    found = []
    for result in run.evaluations:
        chances, num_examples = mapping(result.get("chance")), number(result.get("num_examples"))
        for name, value in mapping(result.get("metrics")).items():
            if _verdict(number(value), number(chances.get(name)), num_examples)[0] == "bad":
                found.append(f"{result.get('dataset', '–')} {name}")
    return found


def evaluation(run: Run) -> Html:
    """The section of the evaluation's metrics, each beside chance."""
    rows = [_metric_row(result, name) for result in run.evaluations for name in mapping(result.get("metrics"))]
    columns = ("Data set", "Metric", "Value", "0 to 1", "Chance", "Against chance", "Task", "Examples")
    note = "<p class='quiet'>The tick on a bar is chance. “At chance”: within two binomial sigma of it.</p>"
    return Html(note + table(columns, rows)) if rows else Html("")


def _metric_row(result: dict, name: str) -> tuple:
    value = number(mapping(result["metrics"])[name])
    chance = number(mapping(result.get("chance")).get(name))
    num_examples = number(result.get("num_examples"))
    kind, text = _verdict(value, chance, num_examples)
    verdict = Html(f'<span class="{kind}">{text}</span>' if text else "")
    data_set, task = (str(result.get(key, "–")) for key in ("dataset", "task"))
    return (
        data_set,
        name,
        Html(f"<b>{format_number(value)}</b>"),
        _meter(value, chance),
        chance,
        verdict,
        task,
        num_examples,
    )


def _meter(value: float, chance: float) -> Html:
    """A bar from 0 to 1 with a tick at chance."""
    if not 0 <= value <= 1:
        return Html("")
    tick = f'<b style="left:{100 * chance:.1f}%"></b>' if 0 <= chance <= 1 else ""
    return Html(f'<div class="meter"><i style="width:{100 * value:.1f}%"></i>{tick}</div>')


def steps_axis(run: Run) -> dict:
    """The same range of steps for every chart, so that charts can be compared."""
    return {"range": [0, max(1, float(run.metrics.steps[-1]))]}


def losses_at_chance(run: Run) -> dict[str, float]:
    """Task → the loss of guessing, of the tasks that end there. Row by row: chance depends on the variant's batch."""
    found = {}
    for name in run.tasks:
        losses, chances = (run.metrics.all_values(key, task=name) for key in ("loss", "chance"))
        known = np.isfinite(chances)
        losses, chances = last_tenth(losses[known]), last_tenth(chances[known])
        if np.isfinite(losses).any() and is_guess(float(np.nanmedian(losses / chances)), 1.0):
            found[name] = float(np.median(chances))
    return found


def loss(run: Run) -> Html:
    """The section of losses: a chart and a row for each task, and the terms of weighted sums."""
    if not len(run.metrics):
        return Html("")
    guessing = losses_at_chance(run)
    charts = [_loss_chart(run, name) for name in run.tasks]
    rows = [_loss_row(run, name, at_chance=name in guessing) for name in run.tasks]
    columns = ("Task", "First tenth", "Last tenth", "Change", "Logged", "Not finite", "Chance", "Objective")
    note = "<p class='quiet'>Dots: logged losses. Line: running median. Numbers: medians of first and last tenth.</p>"
    return Html(note + grid(charts) + table(columns, rows) + _loss_terms(run))


def _loss_chart(run: Run, name: str) -> Html:
    steps, values = run.metrics.values("loss", task=name)
    first, last = first_and_last_tenth(values)
    return figure(
        curve(steps, values, name=name, limit=SMALL_POINTS),
        height=190,
        bar=False,
        title=name,
        note=f"{format_number(first)} → {format_number(last)}",
        xaxis=steps_axis(run),
    )


def _loss_row(run: Run, name: str, *, at_chance: bool) -> tuple:
    values = run.metrics.values("loss", task=name)[1]
    first, last = first_and_last_tenth(values)
    change = percent((last - first) / abs(first) if first else math.nan)
    if at_chance:
        change = Html('<span class="bad">at chance</span>')
    num_lost = int(np.sum(~np.isfinite(values)))
    chance = first_and_last_tenth(run.metrics.values("chance", task=name)[1])[1]
    return name, first, last, change, len(values), num_lost, chance, _objective(run, name)


def _objective(run: Run, name: str) -> str:
    """A task's objective in a few words: "nce", or "nce + 0.5 softmax" for a weighted sum."""
    found = run.recipe(name).get("objective", "–")
    terms = mapping(found)
    return " + ".join(t if w == 1 else f"{w} {t}" for t, w in terms.items()) if terms else str(found)


def _loss_terms(run: Run) -> Html:
    """The terms of weighted sums, before weighting."""
    rows = []
    for name in run.tasks:
        for term in run.metrics.names("losses"):
            values = run.metrics.values("losses", term, task=name)[1]
            if len(values):
                rows.append((name, term, *first_and_last_tenth(values)))
    return Html("<h3>Terms</h3>" + table(("Task", "Term", "First tenth", "Last tenth"), rows)) if rows else Html("")
