"""The elements of a page: escaped text, numbers, tables, meters. Every value is readable without a script."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#x27;"})


class Html(str):
    """Markup that is safe already. Every other string is escaped on its way into the page."""


# The content of a table cell. As in type checkers, an int is a float.
Cell = str | float | None


def escape(value: object) -> Html:
    """The text of a value as HTML."""
    return value if isinstance(value, Html) else Html(str(value).translate(_ENTITIES))


def joined(parts: Iterable[str]) -> Html:
    """Parts of markup one after the other, text among them escaped."""
    return Html("".join(map(escape, parts)))


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


def counted(count: int, noun: str) -> str:
    """ "1 task", "2 tasks"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def quiet(text: str) -> Html:
    """A remark."""
    return Html(f'<p class="quiet">{escape(text)}</p>')


def _is_number(cell: Cell) -> bool:
    return 'class="number"' in cell if isinstance(cell, Html) else not isinstance(cell, str | None)


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Html:
    """A table whose columns with numbers are right-aligned; on a narrow page each row becomes a block of lines."""
    rows = [list(row) for row in rows]
    numeric = [any(map(_is_number, column)) for column in zip(*rows, strict=True)] or [False] * len(columns)
    kinds = [' class="number"' if is_number else "" for is_number in numeric]
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(columns, kinds, strict=True))
    body = "".join(_row(columns, kinds, row) for row in rows)
    return Html(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def _row(columns: Sequence[str], kinds: Sequence[str], row: Sequence[Cell]) -> str:
    texts = [escape(cell if isinstance(cell, str) else format_number(cell)) for cell in row]
    cells = [
        f'<td{kind} data-name="{escape(name)}">{text}</td>'
        for name, kind, text in zip(columns, kinds, texts, strict=True)
    ]
    return f"<tr>{''.join(cells)}</tr>"


def meter(value: float, chance: float = math.nan) -> Html:
    """A bar from 0 to 1 with a tick at chance."""
    if not 0 <= value <= 1:
        return Html("")
    tick = f'<b style="left:{100 * chance:.1f}%"></b>' if 0 <= chance <= 1 else ""
    return Html(f'<div class="meter"><i style="width:{100 * value:.1f}%"></i>{tick}</div>')


def grid(figures: Iterable[Html], *, kind: str = "grid") -> Html:
    """Figures side by side as far as the page is wide."""
    return Html(f'<div class="{kind}">' + "".join(figures) + "</div>")


def tiles(facts: Mapping[str, str]) -> Html:
    """Names and values in a row of boxes."""
    cells = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return Html('<dl class="tiles">' + "".join(cells) + "</dl>")


def facts_list(facts: Mapping[str, str]) -> Html:
    """Names and values, one a line."""
    cells = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return Html('<dl class="facts">' + "".join(cells) + "</dl>")


def picture(source: str, *, alt: str, kind: str = "") -> Html:
    """An image that lies in the page. source: a data URI of the project's own making."""
    attribute = f' class="{kind}"' if kind else ""
    return Html(f'<img src="{escape(source)}" alt="{escape(alt)}"{attribute}>')


def captioned(content: str, *, title: str, note: str = "") -> Html:
    """A figure with its caption above."""
    caption = f"<figcaption><b>{escape(title)}</b> <span>{escape(note)}</span></figcaption>"
    return Html(f"<figure>{caption}{escape(content)}</figure>")
