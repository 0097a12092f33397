"""The elements of a page: escaped text, numbers, tables and Plotly figures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

# Maximum number of points per trace: a screen has fewer pixels.
MAX_POINTS = 2000
NEUTRAL = "#9aa0a6"
# Middle tones: visible on the light page and on the dark one.
COLORS = ("#3b7dd8", "#e07b39", "#2a9d72", "#c44e8a", "#8a63d2", "#b59b00", "#3aa6b9", "#d0504d")
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#x27;"})


class Html(str):
    """Markup that is safe already. Every other string is escaped on its way into the page."""


# The content of a table cell. As in type checkers, an int is a float.
Cell = str | float | None


def escape(value: object) -> Html:
    """The text of a value as HTML."""
    return value if isinstance(value, Html) else Html(str(value).translate(_ENTITIES))


def label(name: str, *, limit: int = 30) -> str:
    """A name as Plotly shows it: shortened, and escaped for Plotly's own subset of HTML."""
    short = name if len(name) <= limit else name[: limit - 1] + "…"
    return short.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def format_number(value: float | None) -> str:
    """A number with separators from 1,000 on, else with four significant digits; a dash if it is unknown."""
    if value is None or math.isnan(value):
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def right(text: str) -> Html:
    """A right-aligned cell, as for numbers."""
    return Html(f'<span class="number">{escape(text)}</span>')


def fixed(value: float, form: str = ".1f") -> Html:
    """A number with as many digits as the others in its column."""
    return right(format(value, form) if math.isfinite(value) else "–")


def percent(value: float) -> Html:
    """A share as a percentage with one digit."""
    return fixed(value, ".1%")


def duration(seconds: float) -> str:
    """A time in seconds, in minutes and seconds, or in hours and minutes."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def _is_number(cell: Cell) -> bool:
    return 'class="number"' in cell if isinstance(cell, Html) else not isinstance(cell, str | None)


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Html:
    """A table that scrolls inside its own box; columns with numbers are right-aligned."""
    rows = [list(row) for row in rows]
    numeric = [any(map(_is_number, column)) for column in zip(*rows, strict=True)] or [False] * len(columns)
    head = _table_row("th", columns, numeric)
    body = "".join(_table_row("td", row, numeric) for row in rows)
    return Html(f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>')


def _table_row(tag: str, cells: Sequence[Cell], numeric: Sequence[bool]) -> str:
    texts = [escape(cell if isinstance(cell, str) else format_number(cell)) for cell in cells]
    attributes = [' class="number"' if is_number else "" for is_number in numeric]
    filled = (f"<{tag}{kind}>{text}</{tag}>" for kind, text in zip(attributes, texts, strict=True))
    return f"<tr>{''.join(filled)}</tr>"


def _json_values(value: object) -> object:
    """A value as JSON can hold it: arrays as lists, null for non-finite numbers, six digits of a fraction."""
    if isinstance(value, Mapping):
        return {key: _json_values(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [_json_values(item) for item in value]
    if isinstance(value, float | np.floating):
        if not math.isfinite(value):
            return None
        # Whole numbers, such as steps, keep all their digits.
        return int(value) if value == int(value) else float(f"{value:.6g}")
    return int(value) if isinstance(value, np.integer) else value


def figure(traces: Sequence[Mapping], *, height: int, title: str = "", note: str = "", **layout: object) -> Html:
    """A Plotly figure as wide as its box. Its JSON holds no ``<``, so nothing in it can end the script element."""
    spec = json.dumps(_json_values({"data": traces, "layout": layout}), allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        spec = spec.replace(character, f"\\u{ord(character):04x}")
    caption = f"<figcaption><b>{escape(title)}</b> <span>{escape(note)}</span></figcaption>" if title else ""
    return Html(
        f'<figure>{caption}<div class="chart" style="height:{height}px">'
        f'<script type="application/json">{spec}</script></div></figure>'
    )


def grid(figures: Iterable[Html]) -> Html:
    """Small figures side by side."""
    return Html('<div class="grid">' + "".join(figures) + "</div>")


def tiles(facts: Mapping[str, str]) -> Html:
    """Names and values in a row of boxes."""
    cells = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return Html('<dl class="tiles">' + "".join(cells) + "</dl>")


def thin(x: np.ndarray, y: np.ndarray, *, limit: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most ``limit`` finite points: the lowest and the highest of every bucket, so that spikes stay visible."""
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= limit:
        return x, y
    buckets = np.array_split(np.arange(len(x)), limit // 2)
    kept = np.unique([bucket[pick(y[bucket])] for bucket in buckets for pick in (np.argmin, np.argmax)])
    return x[kept], y[kept]


def running_median(x: np.ndarray, y: np.ndarray, *, limit: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """The median of a centred window of a twentieth of the finite points, at ``limit`` places at most."""
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    half = max(2, len(y) // 40)
    places = np.unique(np.linspace(0, max(len(y) - 1, 0), min(len(y), limit)).astype(int))
    return x[places], np.array([np.median(y[max(0, place - half) : place + half + 1]) for place in places])


def line_trace(x: np.ndarray, y: np.ndarray, *, color: str = COLORS[0], **fields: object) -> dict:
    """A trace whose points are joined by lines."""
    return {"type": "scatter", "mode": "lines", "x": x, "y": y, **fields, "line": {"color": color, "width": 2.5}}


def curve(x: np.ndarray, y: np.ndarray, *, name: str, color: str = COLORS[0], limit: int = MAX_POINTS) -> list[dict]:
    """Two traces: every value, light, and their running median, strong. The legend switches both together."""
    raw, smooth = thin(x, y, limit=limit), running_median(x, y, limit=limit)
    common = {"name": label(name), "legendgroup": name.translate(_ENTITIES), "type": "scatter"}
    dots = {"mode": "markers", "marker": {"color": color, "size": 4, "opacity": 0.28}, "hoverinfo": "skip"}
    strong = {"mode": "lines", "line": {"color": color, "width": 2.5}, "hovertemplate": "%{y:.4g}"}
    return [
        {**common, **dots, "x": raw[0], "y": raw[1], "showlegend": False},
        {**common, **strong, "x": smooth[0], "y": smooth[1]},
    ]
