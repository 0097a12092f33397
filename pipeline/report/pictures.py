"""What a model does with held-out media, in pictures: the content of showcase.json (``evaluate.showcase``)."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable

import numpy as np

from pipeline.report.charts import COLORS
from pipeline.report.elements import Html, captioned, escape, grid, picture, quiet
from pipeline.report.run_files import Run
from pipeline.report.values import listed, number, records

# Data URIs of pictures, as ``data.thumbnails`` writes them.
_PICTURE = re.compile(r"data:image/(?:webp|png|jpeg);base64,[A-Za-z0-9+/=]+")
# Size of a map of a common space, in its own units, and of the pictures in it.
_MAP, _SPOT = 360, 20
# Colour and mark of each kind of point in a map.
_MARKS = {"text": 1, "audio": 2, "video": 3}
# Columns from which a map of experts needs the width of a phone.
_WIDE = 10
# Maximum number of classes whose confusions are shown as a table.
_MAX_CLASSES = 24


def first_pictures(run: Run) -> Html:
    """One picture of each kind: a film with its sound, a search, a choice, the confusions, the common space."""
    shown = run.showcase
    found = [
        *(_film(film) for film in records(shown.get("films"))[:1]),
        *(_search_card(card, title) for title, card in _cards(shown.get("searches"))[:2]),
        *(_choice_card(card, title) for title, card in _cards(shown.get("choices"))[1:2]),
        *filter(None, (_confusion(one) for one in records(shown.get("confusions"))[:1])),
        *(_map(one) for one in records(shown.get("maps"))[1:2] or records(shown.get("maps"))[:1]),
    ]
    note = quiet("Held-out samples, evenly spread, none of them picked. Green with a check mark: right.")
    return Html(grid(found, kind="glance") + note) if found else Html("")


def examples(run: Run) -> Html:
    """All cards: media with their nearest texts, texts with their nearest media, films."""
    shown = run.showcase
    searches = "".join(_group(g, _search_card) for g in records(shown.get("searches")))
    choices = "".join(_group(g, _choice_card) for g in records(shown.get("choices")))
    return Html(grid(map(_film, records(shown.get("films"))[1:]), kind="glance") + searches + choices)


def _group(group: dict, draw: Callable[[dict], Html]) -> str:
    cards = grid(map(draw, records(group.get("cards"))), kind="cards")
    return f"<h3>{escape(group.get('title', ''))}</h3>{cards}"


def _cards(groups: object) -> list[tuple[str, dict]]:
    """(title of its group, card), one of each group before the second of any."""
    titled = [[(str(g.get("title", "")), card) for card in records(g.get("cards"))] for g in records(groups)]
    return [one for row in itertools.zip_longest(*titled) for one in row if one]


def space_and_confusions(run: Run) -> Html:
    """The common spaces in two dimensions, and the classes that are taken for each other."""
    maps = [_map(found) for found in records(run.showcase.get("maps"))]
    confusions = [_confusion(found) for found in records(run.showcase.get("confusions"))]
    out = grid(maps) if maps else ""
    return Html(out + (grid(confusions) if any(confusions) else ""))


def _picture(value: object, *, alt: str, kind: str = "") -> Html:
    """A picture of the file, if it is one: a page must not load what a foreign file names."""
    text = value if isinstance(value, str) else ""
    return picture(text, alt=alt, kind=kind) if _PICTURE.fullmatch(text) else Html("")


def _answers(values: object, *, limit: int = 5) -> str:
    """Texts with their scores; the right ones are marked."""
    out = []
    for answer in records(values)[:limit]:
        is_right, score = answer.get("right") is True, number(answer.get("score"))
        mark = "✓ " if is_right else ""
        text = f"{mark}{answer.get('text', '')}"
        shown = f"{score:.2f}" if math.isfinite(score) else ""
        kind = ' class="hit"' if is_right else ""
        out.append(f"<li{kind}><span>{escape(text)}</span><span>{shown}</span></li>")
    return f"<ol>{''.join(out)}</ol>"


def _choice_card(card: dict, title: str = "") -> Html:
    """Media with the texts or classes that the model found nearest."""
    truth, is_wide = str(card.get("truth", "")), card.get("wide") is True
    image = _picture(card.get("picture"), alt=truth, kind="strip" if is_wide else "")
    kind = "" if is_wide else ' class="query"'
    head = f"<div{kind}>{image}<div>{escape(truth)}</div></div>"
    return Html(f'<div class="card">{_title(title)}{head}{_answers(card.get("answers"))}</div>')


def _search_card(card: dict, title: str = "") -> Html:
    """A text with the five media that the model found nearest."""
    out = []
    for result in records(card.get("results"))[:5]:
        is_right, text = result.get("right") is True, str(result.get("text", ""))
        kind, mark = (' class="hit"', "✓ ") if is_right else ("", "")
        out.append(f"<li{kind}>{_picture(result.get('picture'), alt=text)}<span>{mark}{escape(text)}</span></li>")
    query = f'<div class="text">“{escape(card.get("query", ""))}”</div>'
    return Html(f'<div class="card">{_title(title)}{query}<ol class="found">{"".join(out)}</ol></div>')


def _title(title: str) -> str:
    return f"<h4>{escape(title)}</h4>" if title else ""


def _film(film: dict) -> Html:
    """A film as a strip over the spectrogram of its sound, and the texts that were chosen by sight and by ear."""
    truth = str(film.get("truth", ""))
    strip = _picture(film.get("strip"), alt=f"frames of a film: {truth}", kind="strip")
    sound = _picture(film.get("spectrogram"), alt=f"spectrogram of its sound: {truth}", kind="strip")
    lists = "".join(
        f"<div><b>{name}</b>{_answers(film.get(key))}</div>"
        for name, key in (("chosen by its frames", "by_video"), ("chosen by its sound", "by_audio"))
    )
    title = _title(f"A film and its sound: {truth}")
    return Html(f'<div class="card film">{title}{strip}{sound}<div class="pair">{lists}</div></div>')


def _confusion(found: dict) -> Html:
    """Classes down, answers across, in percent of each class; the diagonal is right."""
    classes = [str(name) for name in listed(found.get("classes"))]
    counts = _matrix(found.get("counts"))
    if counts is None or not classes or counts.shape != (len(classes), len(classes)) or len(classes) > _MAX_CLASSES:
        return Html("")
    # With many classes the words are too long for the columns: their numbers are in front of the words.
    head = "".join(f'<th scope="col">{i + 1}</th>' for i in range(len(classes)))
    rows = []
    for index, (name, row) in enumerate(zip(classes, counts, strict=True)):
        total = row.sum()
        cells = "".join(_share_cell(count / total if total else 0.0) for count in row)
        rows.append(f'<tr><th scope="row">{index + 1} {escape(name)}</th>{cells}</tr>')
    head = f'<thead><tr><th class="name">truth ↓ answer →</th>{head}</tr></thead>'
    body = Html(f'<table class="heat">{head}<tbody>{"".join(rows)}</tbody></table>')
    note = f"percent of each class, {int(counts.sum()):,} held-out samples"
    return captioned(body, title=str(found.get("title", "")), note=note)


def _share_cell(share: float) -> str:
    dark = " class='dark'" if share > 0.45 else ""
    return f'<td{dark} style="--heat:{100 * share:.0f}%">{100 * share:.0f}</td>' if share else "<td></td>"


def _matrix(value: object) -> np.ndarray | None:
    try:
        found = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return found if found.ndim == 2 and np.isfinite(found).all() and (found >= 0).all() else None


def _map(found: dict) -> Html:
    """Points in two dimensions: media as small pictures, texts as words, sounds as dots."""
    points = [p for p in records(found.get("points")) if math.isfinite(number(p.get("x")) + number(p.get("y")))]
    if not points:
        return Html("")
    places = _fitted(np.array([[number(p["x"]), number(p["y"])] for p in points]))
    # Words last: they must not lie behind pictures.
    order = sorted(range(len(points)), key=lambda i: points[i].get("kind") == "text")
    body = "".join(_point(points[i], *places[i]) for i in order)
    title = str(found.get("title", ""))
    svg = Html(f'<svg class="map" viewBox="0 0 {_MAP} {_MAP}" role="img" aria-label="{escape(title)}">{body}</svg>')
    legend = _map_legend({str(p.get("kind", "")) for p in points})
    return captioned(Html(svg + legend), title=title, note=str(found.get("note", "")))


def _map_legend(kinds: Iterable[str]) -> str:
    words = {"text": "words: texts", "audio": "● sounds", "video": "films: their middle frame", "image": "images"}
    items = "".join(f"<li>{escape(words.get(kind, kind))}</li>" for kind in sorted(kinds))
    return f'<ul class="legend">{items}</ul>'


def _fitted(places: np.ndarray) -> np.ndarray:
    """Places scaled alike on both axes into the square of the map, y upwards."""
    low, high = places.min(0), places.max(0)
    scale = (_MAP - 3 * _SPOT) / max(float((high - low).max()), 1e-9)
    centred = (places - (low + high) / 2) * scale
    return np.column_stack([_MAP / 2 + centred[:, 0], _MAP / 2 - centred[:, 1]])


def _point(point: dict, x: float, y: float) -> str:
    kind, label = str(point.get("kind", "")), str(point.get("label", ""))
    if kind == "text":
        # A word at an edge grows inwards.
        anchor = "start" if x < _MAP / 4 else "end" if x > 3 * _MAP / 4 else "middle"
        return f'<text x="{x:.0f}" y="{y + 4:.0f}" text-anchor="{anchor}">{escape(label)}</text>'
    image = point.get("picture")
    if isinstance(image, str) and _PICTURE.fullmatch(image):
        place = f'x="{x - _SPOT / 2:.0f}" y="{y - _SPOT / 2:.0f}" width="{_SPOT}" height="{_SPOT}"'
        return f'<image {place} href="{image}"><title>{escape(label)}</title></image>'
    color = f"f{_MARKS.get(kind, 0)}"
    return (
        f'<circle class="{color}" cx="{x:.0f}" cy="{y:.0f}" r="4"><title>{escape(f"{kind}: {label}")}</title></circle>'
    )


def expert_maps(run: Run) -> Html:
    """For a few inputs the expert that took each patch, layer by layer."""
    rows = [_expert_row(found) for found in records(run.showcase.get("expert_maps"))]
    if not any(rows):
        return Html("")
    count = int(max((number(m.get("num_experts")) for m in records(run.showcase["expert_maps"])), default=0))
    swatch = '<li><i class="swatch" style="background:{}"></i>{}</li>'
    keys = "".join(swatch.format(f"var(--c{e % COLORS})", f"expert {e}") for e in range(min(count, COLORS)))
    keys += swatch.format("var(--rule)", "no expert")
    note = quiet("Each patch with the number and the colour of the expert that weighs it most; − where none took it.")
    return Html(f'<h3>Which expert took which patch</h3>{note}<ul class="legend">{keys}</ul>{"".join(rows)}')


def _expert_row(found: dict) -> str:
    layers = [_matrix_of_experts(layer) for layer in listed(found.get("layers"))]
    image = _picture(found.get("picture"), alt=str(found.get("title", "")))
    if not image or not layers or any(layer is None for layer in layers):
        return ""
    maps = [captioned(_expert_grid(layer), title=f"layer {i}") for i, layer in enumerate(layers) if layer is not None]
    first = captioned(image, title=str(found.get("title", "")))
    wide = any(layer is not None and layer.shape[1] > _WIDE for layer in layers)
    return grid([first, *maps], kind="maps wide" if wide else "maps")


def _matrix_of_experts(value: object) -> np.ndarray | None:
    """(rows, columns) of experts, -1 where none took the patch; None if it is not one."""
    rows = [[number(cell) for cell in listed(row)] for row in listed(value)]
    known = rows and rows[0] and len({len(row) for row in rows}) == 1
    cells = np.array(rows) if known else None
    return cells.astype(int) if cells is not None and np.isfinite(cells).all() else None


def _expert_grid(cells: np.ndarray) -> Html:
    size = 24
    out = []
    for (row, column), expert in np.ndenumerate(cells):
        x, y = size * column, size * row
        color = "none" if expert < 0 else f"f{expert % COLORS}"
        text = "−" if expert < 0 else str(expert)
        out.append(f'<rect class="{color}" x="{x}" y="{y}" width="{size - 1}" height="{size - 1}"/>')
        out.append(f'<text class="on" x="{x + size / 2:.0f}" y="{y + 16}" text-anchor="middle">{text}</text>')
    width, height = size * cells.shape[1], size * cells.shape[0]
    return Html(
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="experts of the patches">{"".join(out)}</svg>'
    )
