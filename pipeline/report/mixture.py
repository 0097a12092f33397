"""The sections of a report that show how it was trained: the mixture of tasks, and what changed over the steps."""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.special import bdtr, bdtrc

from pipeline.report.charts import line_chart, share_bars, smooth_line
from pipeline.report.elements import Html, grid, percent, quiet, table
from pipeline.report.run_files import Run
from pipeline.report.values import number

# Probability that chance alone puts any of a run's tasks outside its interval.
_FALSE_ALARM = 0.01


@dataclasses.dataclass(frozen=True)
class Share:
    """A task's part of the steps. low, high: the interval that chance alone leaves for no task in 99 of 100 runs."""

    expected: float
    actual: float
    low: float
    high: float

    @property
    def is_usual(self) -> bool:
        return self.low <= self.actual <= self.high


def shares(run: Run) -> dict[str, Share]:
    """Task → its expected and actual share of the steps."""
    weights = {name: number(run.task(name).get("weight", run.recipe(name).get("weight", 1.0))) for name in run.tasks}
    steps = {name: number(run.task(name).get("steps", run.metrics.tasks[name])) for name in run.tasks}
    weight_sum, step_sum = np.nansum(list(weights.values())), int(np.nansum(list(steps.values())))
    if not weight_sum > 0 or not step_sum > 0:
        return {}
    found = {}
    for name, weight in weights.items():
        expected = float(np.nan_to_num(weight / weight_sum))
        low, high = usual_counts(step_sum, expected, error=_FALSE_ALARM / len(weights))
        found[name] = Share(expected, float(np.nan_to_num(steps[name])) / step_sum, low / step_sum, high / step_sum)
    return found


def usual_counts(draws: int, share: float, *, error: float) -> tuple[int, int]:
    """The fewest and the most of ``draws`` that a share gets, each side but for a probability of ``error`` / 2.

    From the binomial distribution itself: a rare task has no bell curve.
    """
    low, high = 0, draws
    # The smallest k with P(X <= k) > error / 2.
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if bdtr(middle, draws, share) > error / 2 else (middle + 1, high)
    fewest, low, high = low, 0, draws
    # The smallest k with P(X > k) < error / 2.
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if bdtrc(middle, draws, share) < error / 2 else (middle + 1, high)
    return fewest, low


def mixture(run: Run) -> Html:
    """The section of each task's share of the steps, expected and actual."""
    found = shares(run)
    if not found:
        return Html("")
    usual, unusual = "as expected", Html('<span class="bad">outside</span>')
    rows = []
    for name, share in found.items():
        steps, examples = (number(run.task(name).get(key)) for key in ("steps", "examples"))
        verdict = usual if share.is_usual else unusual
        facts = (steps, examples, run.data_set(name))
        rows.append((name, percent(share.expected), percent(share.actual), verdict, *facts))
    columns = ("Task", "Expected", "Actual", "Verdict", "Steps", "Examples", "Data set")
    note = "Bars: share of the steps. Brackets: where chance alone keeps all tasks together in 99 of 100 runs."
    bars = share_bars([(name, s.actual, s.low, s.high, s.is_usual) for name, s in found.items()])
    return Html(quiet(note) + bars + table(columns, rows))


def schedules(run: Run) -> Html:
    """The section of learning rate, gradient norm and temperatures over the steps."""
    metrics, end = run.metrics, run.metrics.last_step
    rates, norms = metrics.series("learning_rate"), metrics.series("grad_norm")
    pairs = metrics.names("temperatures")
    temperatures = [smooth_line(p, metrics.series("temperatures", p), number=i) for i, p in enumerate(pairs)]
    charts = [
        line_chart([smooth_line("learning rate", rates)], title="Learning rate", x_end=end, form=_small),
        line_chart([smooth_line("gradient norm", norms, number=1)], title="Gradient norm", x_end=end, log=True),
        line_chart(temperatures, title="Temperature of each pair of modalities", x_end=end),
    ]
    return grid(filter(None, charts)) if any(charts) else Html("")


def _small(value: float) -> str:
    return f"{value:.1e}" if value else "0"
