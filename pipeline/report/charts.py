"""Charts as SVG without a script: lines over the steps, bars with intervals, heat maps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from pipeline.report.elements import Html, captioned, escape, format_number
from pipeline.report.metrics_file import Series

# Width of a chart, in its own units: about the pixels of a phone, so that its text is never scaled down there.
_WIDTH = 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 8, 32
# Maximum number of points of a line.
MAX_POINTS = 120
# Minimum number of values behind a point, once a line is long enough.
_VALUES_A_POINT = 5
# Number of colours of the page (``style.py``); lines beyond them repeat colours with other dashes.
COLORS = 7
_DASHES = ("", "7 3", "2 3", "9 3 2 3")


@dataclasses.dataclass(frozen=True)
class Line:
    """A line over the steps.

    name: in the legend, which leaves out a line without one. low, high: a shade around it. color: the number of its
    colour; None: grey. more: text behind its last value in the legend.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    color: int | None = 0
    dash: str = ""
    more: str = ""

    @property
    def style(self) -> str:
        """CSS classes."""
        return "line grey" if self.color is None else f"line c{self.color % COLORS}"


def smooth_line(name: str, series: Series, *, number: int = 0) -> Line:
    """A series as medians of neighbouring values, shaded from the lowest to the highest. number: among its lines."""
    known = np.isfinite(series.values)
    x, y = series.steps[known], series.values[known]
    low, high = (edge[known] for edge in series.range)
    dash = _DASHES[number // COLORS % len(_DASHES)]
    parts = min(MAX_POINTS, len(y) // _VALUES_A_POINT)
    if parts < 3:
        return Line(name, x, y, color=number, dash=dash)
    groups = np.array_split(np.arange(len(y)), parts)
    return Line(
        name,
        np.array([x[g].mean() for g in groups]),
        np.array([np.median(y[g]) for g in groups]),
        np.array([low[g].min() for g in groups]),
        np.array([high[g].max() for g in groups]),
        color=number,
        dash=dash,
    )


def constant_line(name: str, series: Series, *, color: int | None) -> Line | None:
    """The median of a series from its first to its last step, dashed; None if it is empty."""
    known = np.isfinite(series.values)
    if not known.any():
        return None
    x = series.steps[known]
    return Line(name, np.array([x[0], x[-1]]), np.full(2, np.median(series.values[known])), color=color, dash="4 3")


@dataclasses.dataclass(frozen=True)
class _Frame:
    """The place of a value in the picture."""

    x_end: float
    low: float
    high: float
    height: int
    log: bool

    def x(self, value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * value / self.x_end

    def y(self, value: float) -> float:
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, self._inside(value)))
        return _TOP + (self.height - _TOP - _BOTTOM) * (high - at) / (high - low)

    def _inside(self, value: float) -> float:
        return min(max(value, self.low), self.high)


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_end: float,
    note: str = "",
    form: Callable[[float], str] = format_number,
    zero: bool = False,
    log: bool = False,
    height: int = 200,
    x_name: str = "step",
) -> Html:
    """Lines over the steps 0 to ``x_end``. form: of a value. zero: the scale begins at 0. The legend is text."""
    lines = [line for line in lines if len(line.y)]
    if not lines:
        return Html("")
    values = np.concatenate([line.y for line in lines])
    frame = _frame(values, x_end=x_end, zero=zero, log=log and values.min() > 0, height=height)
    body = _axes(frame, form, x_name) + "".join(_shade(frame, line) for line in lines)
    body += "".join(_path(frame, line) for line in lines)
    svg = f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">{body}</svg>'
    return captioned(Html(svg + _legend(lines, form)), title=title, note=note)


def _frame(values: np.ndarray, *, x_end: float, zero: bool, log: bool, height: int) -> _Frame:
    low, high = float(values.min()), float(values.max())
    low = min(0.0, low) if zero else low
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    if log:
        return _Frame(max(x_end, 1.0), low / 1.1, high * 1.1, height, log)
    return _Frame(max(x_end, 1.0), low if zero else low - margin, high + margin, height, log)


def _ticks(frame: _Frame) -> list[float]:
    """At most six round values within the scale."""
    if frame.log:
        decades = range(math.floor(math.log10(frame.low)), math.ceil(math.log10(frame.high)) + 1)
        found = [m * 10.0**d for d in decades for m in (1, 2, 5) if frame.low <= m * 10.0**d <= frame.high]
        return found[:: max(1, -(-len(found) // 5))]
    step = _round_step((frame.high - frame.low) / 4)
    first, last = math.ceil(frame.low / step), math.floor(frame.high / step)
    return [step * i for i in range(first, last + 1)]


def _round_step(size: float) -> float:
    """1, 2 or 5 times a power of ten, no less than ``size``."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= size * (1 - 1e-9))


def _axes(frame: _Frame, form: Callable[[float], str], x_name: str) -> str:
    bottom, end = frame.height - _BOTTOM, _WIDTH - _RIGHT
    out = []
    for value in _ticks(frame):
        y = frame.y(value)
        out.append(f'<path class="rule" d="M{_LEFT} {y:.1f}H{end}"/>')
        out.append(f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{escape(form(value))}</text>')
    step = _round_step(frame.x_end / 4)
    for i in range(int(frame.x_end / step + 1e-9) + 1):
        # A word at the right edge would be cut.
        anchor = "end" if frame.x(i * step) > end - 14 else "middle"
        out.append(f'<text x="{frame.x(i * step):.1f}" y="{bottom + 14}" text-anchor="{anchor}">{i * step:,.6g}</text>')
    out.append(f'<path class="axis" d="M{_LEFT} {bottom}H{end}"/>')
    out.append(f'<text x="{end}" y="{bottom + 28}" text-anchor="end" class="name">{escape(x_name)}</text>')
    return "".join(out)


def _shade(frame: _Frame, line: Line) -> str:
    if line.low is None or line.high is None:
        return ""
    xs = [frame.x(v) for v in line.x]
    upper = [f"{x:.1f} {frame.y(v):.1f}" for x, v in zip(xs, line.high, strict=True)]
    lower = [f"{x:.1f} {frame.y(v):.1f}" for x, v in zip(xs, line.low, strict=True)]
    return f'<path class="{line.style} shade" d="M{"L".join(upper + lower[::-1])}Z"/>'


def _path(frame: _Frame, line: Line) -> str:
    points = [f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in zip(line.x, line.y, strict=True)]
    dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
    if len(points) == 1:
        x, y = points[0].split()
        return f'<circle class="{line.style} point" cx="{x}" cy="{y}" r="3"/>'
    return f'<path class="{line.style}" d="M{"L".join(points)}"{dash}/>'


def _legend(lines: Sequence[Line], form: Callable[[float], str]) -> str:
    items = []
    for line in filter(lambda line: line.name, lines):
        dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
        stroke = f'<path class="{line.style}" d="M1 5H25"{dash}/>'
        key = f'<svg class="key" viewBox="0 0 26 10" aria-hidden="true">{stroke}</svg>'
        items.append(f"<li>{key}{escape(line.name)} <b>{escape(form(float(line.y[-1])))}</b>{escape(line.more)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def share_bars(rows: Sequence[tuple[str, float, float, float, bool]]) -> Html:
    """For each (name, share, low, high, good) a bar, and around it the interval from low to high."""
    top = max((max(share, high) for _, share, _, high, _ in rows), default=1.0) or 1.0
    out = []
    for name, share, low, high, good in rows:
        place = f"left:{100 * low / top:.2f}%;width:{100 * (high - low) / top:.2f}%"
        bar = f'<i style="width:{100 * share / top:.2f}%"></i><b style="{place}"></b>'
        kind = "" if good else " off"
        text = f"{share:.1%} <span>expected {low:.1%} to {high:.1%}</span>"
        out.append(f'<div class="bar{kind}"><span>{escape(name)}</span><div>{bar}</div><span>{text}</span></div>')
    return Html(f'<div class="bars">{"".join(out)}</div>')


def heat_map(cells: np.ndarray, *, rows: Sequence[str], title: str, note: str, top: float, columns: str) -> Html:
    """A table of shaded cells from 0 to ``top``; the numbers are in them while there are few enough to be read."""
    shown = cells.shape[1] <= 10
    head = "".join(f'<th scope="col">{i}</th>' for i in range(cells.shape[1])) if shown else ""
    lines = []
    for name, row in zip(rows, cells, strict=True):
        boxes = "".join(_heat_cell(value, top, shown) for value in row)
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{boxes}</tr>')
    first = f'<th class="name">{escape(columns)}</th>'
    head = f"<thead><tr>{first}{head}</tr></thead>" if shown else ""
    return captioned(Html(f'<table class="heat">{head}<tbody>{"".join(lines)}</tbody></table>'), title=title, note=note)


def _heat_cell(value: float, top: float, shown: bool) -> str:
    if not math.isfinite(value):
        return "<td></td>"
    share = min(1.0, max(0.0, value / top)) if top > 0 else 0.0
    text = f"{value:.2f}" if shown else ""
    dark = " class='dark'" if share > 0.45 else ""
    return f'<td{dark} style="--heat:{100 * share:.0f}%" title="{value:.3f}">{text}</td>'
