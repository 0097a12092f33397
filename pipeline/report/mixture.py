"""The sections of a report that show how it was trained: the mixture of tasks, and what changed over the steps."""

from __future__ import annotations

import numpy as np

from pipeline.report.elements import COLORS, NEUTRAL, Html, curve, figure, grid, label, line_trace, percent, table, thin
from pipeline.report.learning import steps_axis
from pipeline.report.run_files import Run, shares
from pipeline.report.values import number


def mixture(run: Run) -> Html:
    """The section of each task's share of the steps, expected and actual."""
    found = shares(run)
    if not found:
        return Html("")
    inside, outside = Html("inside"), Html('<span class="bad">outside</span>')
    rows = []
    for name, (share, sigma, actual) in found.items():
        steps, examples = (number(run.task(name).get(key)) for key in ("steps", "examples"))
        band = inside if abs(actual - share) <= 2 * sigma else outside
        rows.append((name, percent(share), percent(actual), band, steps, examples, run.data_set(name)))
    columns = ("Task", "Expected", "Actual", "2σ band", "Steps", "Examples", "Data set")
    return Html(_share_bars(found) + table(columns, rows))


def _share_bars(found: dict[str, tuple[float, float, float]]) -> Html:
    places, names = np.arange(len(found)), list(found)
    expected, sigma, actual = (np.array(column) for column in zip(*found.values(), strict=True))
    bar = {"type": "bar", "orientation": "h", "y": places, "hovertemplate": "%{x:.2%}"}
    band = {"type": "data", "array": 2 * sigma, "color": NEUTRAL, "thickness": 2, "width": 5}
    grey = {"color": NEUTRAL, "opacity": 0.55}
    return figure(
        [
            {**bar, "x": actual, "name": "actual", "marker": {"color": COLORS[0]}},
            {**bar, "x": expected, "name": "expected ± 2σ", "marker": grey, "error_x": band},
        ],
        height=90 + 34 * len(names),
        barmode="group",
        bargap=0.3,
        showlegend=True,
        hovermode="y unified",
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "traceorder": "normal"},
        xaxis={"tickformat": ".0%", "rangemode": "tozero"},
        yaxis={"tickvals": places, "ticktext": [label(name) for name in names], "autorange": "reversed"},
    )


def schedules(run: Run) -> Html:
    """The section of learning rate, gradient norm and temperatures over the steps."""
    charts = [*_learning_rate(run), *_gradient_norm(run), *_temperatures(run)]
    return grid(charts) if charts else Html("")


def _learning_rate(run: Run) -> list[Html]:
    steps, rates = thin(*run.metrics.values("learning_rate"))
    if not len(steps):
        return []
    axes = {"xaxis": steps_axis(run), "yaxis": {"exponentformat": "e"}}
    return [figure([line_trace(steps, rates)], height=230, title="Learning rate", **axes)]


def _gradient_norm(run: Run) -> list[Html]:
    steps, norms = run.metrics.values("grad_norm")
    if not np.isfinite(norms).any():
        return []
    low, high = np.nanmin(norms), np.nanmax(norms)
    scale = "log" if low > 0 else "linear"
    # Digits 1, 2 and 5 as labels, unless the axis spans too many decades for them.
    ticks = {"dtick": "D2"} if low > 0 and high < 1000 * low else {}
    traces = curve(steps, norms, name="gradient norm", color=COLORS[1])
    axes = {"xaxis": steps_axis(run), "yaxis": {"type": scale, **ticks}}
    return [figure(traces, height=230, title="Gradient norm", note=scale, **axes)]


def _temperatures(run: Run) -> list[Html]:
    traces = [
        line_trace(
            *thin(*run.metrics.values("temperatures", pair)), color=COLORS[index % len(COLORS)], name=label(pair)
        )
        for index, pair in enumerate(run.metrics.names("temperatures"))
    ]
    if not traces:
        return []
    return [figure(traces, height=230, title="Temperatures", showlegend=True, xaxis=steps_axis(run))]
