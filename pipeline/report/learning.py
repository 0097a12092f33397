"""The sections of a report that show what was learned: evaluation and losses."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from pipeline.report.charts import constant_line, line_chart, smooth_line
from pipeline.report.elements import Html, escape, format_number, grid, meter, percent, quiet, table
from pipeline.report.metrics_file import Series
from pipeline.report.run_files import Run, first_and_last_tenth, last_tenth
from pipeline.report.values import listed, mapping, number, records
from pipeline.train.chance import is_guess

# Ends of the metrics by which a measurement is judged at first sight, the most telling first.
_TELLING = ("acc1", "recall@5", "map")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One metric of one evaluation.

    interval: where its value may lie, NaN if that is not known. verdict: beside chance, in words; is_good: None if
    chance is not known.
    """

    data_set: str
    task: str
    metric: str
    value: float
    chance: float
    num_examples: float
    interval: tuple[float, float]
    verdict: str
    is_good: bool | None


def measurements(run: Run) -> list[Measurement]:
    """Every metric of every evaluation, in their order."""
    found = []
    for result in run.evaluations:
        chances, num_examples = mapping(result.get("chance")), number(result.get("num_examples"))
        for name, raw in mapping(result.get("metrics")).items():
            value, chance = number(raw), number(chances.get(name))
            verdict_of = _rank_verdict if name.endswith("median_rank") else _verdict
            is_good, verdict = verdict_of(value, chance, num_examples)
            where = (str(result.get(key, "–")) for key in ("dataset", "task"))
            ends = (*map(number, listed(mapping(result.get("intervals")).get(name))), math.nan, math.nan)[:2]
            found.append(Measurement(*where, name, value, chance, num_examples, ends, verdict, is_good))
    return found


def headline_measurements(run: Run) -> list[Measurement]:
    """The most telling metric of each evaluation that stands beside a chance below certainty."""
    found: dict[tuple[str, str], list[Measurement]] = {}
    for one in measurements(run):
        if 0 <= one.chance < 1 and math.isfinite(one.value):
            found.setdefault((one.data_set, one.task), []).append(one)
    return [min(ones, key=_rank) for ones in found.values()]


def _rank(one: Measurement) -> int:
    return next((i for i, name in enumerate(_TELLING) if one.metric.endswith(name)), len(_TELLING))


def _verdict(value: float, chance: float, num_examples: float) -> tuple[bool | None, str]:
    """Above chance only if binomial noise (2 sigma of ``num_examples`` guesses) does not explain the difference."""
    if math.isnan(chance) or math.isnan(value):
        return None, ""
    if chance == 1:
        return None, "always right"
    noise = 2 * math.sqrt(chance * (1 - chance) / num_examples) if 0 < chance < 1 and num_examples > 0 else 0.0
    if value > chance + noise:
        return True, f"{value / chance:.3g}× chance" if chance > 0 else "above chance"
    return False, f"{'below' if value < chance - noise else 'at'} chance"


def _rank_verdict(value: float, chance: float, num_examples: float) -> tuple[bool | None, str]:
    """Of a median rank: lower is better. Guessing has ranks spread evenly up to twice its median, and their median
    deviates by it over the square root of the number of examples."""
    if math.isnan(chance) or math.isnan(value) or chance <= 1:
        return None, ""
    noise = 2 * chance / math.sqrt(num_examples) if num_examples > 0 else 0.0
    if value < chance - noise:
        return True, f"chance / {chance / max(value, 1):.3g}"
    return False, f"{'worse than' if value > chance + noise else 'at'} chance"


def at_chance(run: Run) -> list[str]:
    """The evaluation metrics that guessing would have reached too."""
    return [f"{one.data_set} {one.metric}" for one in measurements(run) if one.is_good is False]


def evaluation(run: Run) -> Html:
    """The section of the evaluation's metrics, each beside chance."""
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for one in measurements(run):
        groups.setdefault((one.data_set, one.task), []).append(one)
    note = "The tick on a bar is chance, the value that guessing reaches. “At chance”: within two sigma of it."
    blocks = [_block(*key, ones) for key, ones in groups.items()]
    curves = _curves(run)
    return Html(quiet(note) + grid(blocks, kind="blocks") + curves) if blocks or curves else Html("")


def _curves(run: Run) -> Html:
    """The evaluations between steps: a chart for each, with a line for each metric from 0 to 1."""
    found: dict[str, dict[str, Series]] = {}
    for line in run.curve:
        step = number(line.get("step"))
        for entry in records(line.get("entries")):
            name = f"{entry.get('dataset', '–')}: {entry.get('task', '–')}"
            for metric, value in mapping(entry.get("metrics")).items():
                if 0 <= number(value) <= 1 and math.isfinite(step):
                    found.setdefault(name, {}).setdefault(metric, Series()).add(step, number(value))
    charts = [
        line_chart(
            [smooth_line(metric, series, number=i) for i, (metric, series) in enumerate(metrics.items())],
            title=name,
            x_end=run.metrics.last_step,
            zero=True,
        )
        for name, metrics in found.items()
    ]
    return Html("<h3>While it trained, on a sample</h3>" + grid(charts)) if charts else Html("")


def _block(data_set: str, task: str, ones: list[Measurement]) -> Html:
    """All metrics of one evaluation, a line each."""
    count = f"{ones[0].num_examples:,.0f} examples" if math.isfinite(ones[0].num_examples) else ""
    head = f"<h3>{escape(data_set)}: {escape(task)} <small>{count}</small></h3>"
    return Html(f'<div class="block">{head}{"".join(map(_metric_row, ones))}</div>')


def _metric_row(one: Measurement) -> str:
    kind = {True: "good", False: "bad", None: "quiet"}[one.is_good]
    chance = f"chance {format_number(one.chance)}, " if math.isfinite(one.chance) else ""
    verdict = f'{chance}<span class="{kind}">{one.verdict}</span>' if one.verdict else chance.rstrip(", ")
    bar = meter(one.value, one.chance) or "<span></span>"
    low, high = one.interval
    between = f" ({format_number(low)} to {format_number(high)})" if math.isfinite(low + high) else ""
    value = f"<b>{format_number(one.value)}</b>"
    return f'<div class="metrics"><span>{escape(one.metric)}</span>{value}{bar}<span>{verdict}{between}</span></div>'


def losses_at_chance(run: Run) -> dict[str, float]:
    """Task → the loss of guessing, of the tasks that end there. Line by line: chance depends on a variant's batch."""
    found = {}
    for name in run.tasks:
        ratios = last_tenth(run.metrics.series("of_chance", task=name).values)
        chances = last_tenth(run.metrics.series("chance", task=name).values)
        if np.isfinite(ratios).any() and is_guess(float(np.nanmedian(ratios)), 1.0):
            found[name] = float(np.nanmedian(chances))
    return found


def tasks_that_learned(run: Run) -> list[str]:
    """The tasks whose loss fell and is clearly below that of guessing."""
    guessing = losses_at_chance(run)
    tenths = {name: first_and_last_tenth(run.metrics.series("loss", task=name).values) for name in run.tasks}
    return [name for name, (first, last) in tenths.items() if last < first and name not in guessing]


def loss(run: Run) -> Html:
    """The section of losses: a chart for each task, a row for each variant, and the terms of weighted sums."""
    if not len(run.metrics):
        return Html("")
    charts = [_loss_chart(run, name) for name in run.tasks]
    guessing = losses_at_chance(run)
    rows = [_loss_row(run, name, v, name in guessing) for name in run.tasks for v in run.metrics.variants(name)]
    columns = ("Task", "Variant", "First tenth", "Last tenth", "Change", "Logged", "Not finite", "Chance", "Objective")
    note = (
        "A line for each variant (input size) of a task: medians of neighbouring steps, shaded from the lowest to the "
        "highest. Dashed: chance, the loss of guessing; it depends on a variant's batch. Numbers: medians of the "
        "first and the last tenth."
    )
    return Html(quiet(note) + grid(filter(None, charts)) + table(columns, rows) + _loss_terms(run))


def _loss_chart(run: Run, name: str) -> Html:
    lines = []
    for index, variant in enumerate(run.metrics.variants(name)):
        chance = constant_line("", run.metrics.series("chance", task=name, variant=variant), color=index)
        more = f", chance {format_number(float(chance.y[0]))}" if chance else ""
        line = smooth_line(variant, run.metrics.series("loss", task=name, variant=variant), number=index)
        lines += [dataclasses.replace(line, more=more), chance]
    first, last = first_and_last_tenth(run.metrics.series("loss", task=name).values)
    note = f"{_objective(run, name)}: {format_number(first)} → {format_number(last)}"
    return line_chart([line for line in lines if line], title=name, note=note, x_end=run.metrics.last_step)


def _loss_row(run: Run, name: str, variant: str, guessing: bool) -> tuple:
    series = run.metrics.series("loss", task=name, variant=variant)
    first, last = first_and_last_tenth(series.values)
    change = percent((last - first) / abs(first) if first else math.nan)
    if guessing:
        change = Html('<span class="bad">at chance</span>')
    chance = first_and_last_tenth(run.metrics.series("chance", task=name, variant=variant).values)[1]
    return name, variant, first, last, change, series.count, series.lost, chance, _objective(run, name)


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
            series = run.metrics.series("losses", term, task=name)
            if series.count:
                rows.append((name, term, *first_and_last_tenth(series.values)))
    return Html("<h3>Terms</h3>" + table(("Task", "Term", "First tenth", "Last tenth"), rows)) if rows else Html("")
