"""A page to walk through what a model has learned: items of all modalities, each with its nearest of the others.

Everything is computed here: the page asks nothing of anyone. Items are a sample, spread over the folder and bounded by
the size of the page; the nearest of an item are the nearest within that sample.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.modalities import TEXT
from pipeline.embed import folder as folders
from pipeline.embed.page import document, escaped, plural
from pipeline.embed.preparations import modalities_of
from pipeline.embed.search import Search
from pipeline.embed.search_page import MAX_MEDIA_BYTES, footer, media, short
from pipeline.embed.thumbnails import Thumbnail, thumbnail
from pipeline.errors import DataError
from pipeline.files import write_bytes

# Items of a modality, and the nearest of each other modality that the page knows of an item.
_ITEMS = 96
_NEAREST = 6
# Items of a modality that are looked at for each one that is taken: texts repeat.
_LOOKED_AT = 8


@dataclasses.dataclass
class Shown:
    """An item of the page. vectors: space → (K,)."""

    modality: str
    name: str
    source: str
    prepared_as: str
    times: tuple[float | None, float | None]
    vectors: dict[str, np.ndarray]
    thumb: Thumbnail = dataclasses.field(default_factory=Thumbnail)


def write_explorer(folder: Path) -> Path:
    """Writes explore.html into a folder of embeddings. Raises RequestError or DataError if it cannot be read."""
    search = Search(folder)
    by_modality = _sampled(search)
    items = _with_thumbnails(search, by_modality)
    if not items:
        raise DataError(f"{folder}: nothing was embedded, so there is nothing to explore")
    script = resources.files("pipeline.embed").joinpath("explorer.js").read_text(encoding="utf-8")
    path = folder / "explore.html"
    write_bytes(path, document("Explore a run", _body(search, items), script=script).encode())
    return path


# --- the sample ---


def _sampled(search: Search) -> dict[str, list[Shown]]:
    """Modality → items evenly spread over the folder, no text twice."""
    out = {}
    counts = _counts(search.folder)
    for modality in modalities_of(search.encoder, tuple(search.description.spaces)):
        if not counts.get(modality):
            continue
        wanted = min(counts[modality], _ITEMS * (_LOOKED_AT if modality == TEXT else 1))
        chosen = np.unique(np.linspace(0, counts[modality] - 1, wanted).round().astype(int))
        found = list(_read(search, modality, chosen))
        if modality == TEXT:
            found = list({one.source: one for one in found}.values())
            found = [found[i] for i in np.unique(np.linspace(0, len(found) - 1, _ITEMS).round().astype(int))]
        out[modality] = found
    return out


def _counts(folder: Path) -> dict[str, int]:
    """Modality → number of items that were embedded."""
    counts: dict[str, int] = {}
    for _, _, path in folders.parts(folder):
        for modality, number in _embedded(pq.read_table(path, columns=["modality", "reject"])).items():
            counts[modality] = counts.get(modality, 0) + len(number)
    return counts


def _embedded(table: pa.Table) -> dict[str, np.ndarray]:
    """Modality → rows of its items that were embedded."""
    good = table.column("reject").is_null().to_numpy()
    names = np.asarray(table.column("modality").to_pylist(), object)
    return {str(name): np.flatnonzero(good & (names == name)) for name in set(names.tolist())}


def _read(search: Search, modality: str, chosen: np.ndarray) -> Iterator[Shown]:
    """Items by their numbers among those of a modality."""
    first = 0
    for _, _, path in folders.parts(search.folder):
        rows = _embedded(pq.read_table(path, columns=["modality", "reject"])).get(modality, np.zeros(0, int))
        mine = rows[chosen[(chosen >= first) & (chosen < first + len(rows))] - first]
        first += len(rows)
        if len(mine):
            for row in pq.read_table(path).take(mine).to_pylist():
                yield _shown(row, search)


def _shown(row: dict[str, Any], search: Search) -> Shown:
    vectors = {s: np.asarray(row[s], np.float32) for s in search.description.spaces if row[s] is not None}
    name = row["source"] if row["modality"] == TEXT else row["caption"] or row["id"]
    name, times = short(name, limit=120, end=False), (row["start_s"], row["end_s"])
    return Shown(row["modality"], name, row["source"], row["prepared_as"], times, vectors)


def _with_thumbnails(search: Search, by_modality: dict[str, list[Shown]]) -> list[Shown]:
    """The items whose media fit into the page, each modality with the same share of it."""
    media_kinds = [name for name in by_modality if name != TEXT]
    out = []
    for modality, found in by_modality.items():
        left = MAX_MEDIA_BYTES // max(1, len(media_kinds))
        # Spread over the folder as far as the room reaches, not its beginning alone.
        for one in [found[i] for i in _spread_order(len(found))]:
            one.thumb = thumbnail(search, modality, one.source, one.prepared_as, one.times)
            left -= one.thumb.num_bytes
            if left < 0:
                break
            out.append(one)
    return out


def _spread_order(count: int) -> list[int]:
    """0 to count - 1, so that every beginning of the list is spread over all of it."""
    bits = max(1, (count - 1).bit_length())
    return [i for i in (int(f"{n:0{bits}b}"[::-1], 2) for n in range(1 << bits)) if i < count]


# --- the page ---


def nearest(items: list[Shown], search: Search) -> list[dict[str, list[list[float]]]]:
    """Of each item: modality → [number of an item, cosine] of the nearest, the best first."""
    by_modality: dict[str, list[int]] = {}
    for number, one in enumerate(items):
        by_modality.setdefault(one.modality, []).append(number)
    out: list[dict[str, list[list[float]]]] = [{} for _ in items]
    for modality, mine in by_modality.items():
        for other, theirs in by_modality.items():
            space = search.space_between(modality, other)
            if other == modality or space is None:
                continue
            cosines = _matrix(items, mine, space) @ _matrix(items, theirs, space).T
            for number, row in zip(mine, cosines, strict=True):
                best = np.argsort(-row, kind="stable")[:_NEAREST]
                out[number][other] = [[theirs[i], round(float(row[i]), 3)] for i in best]
    return out


def _matrix(items: list[Shown], numbers: list[int], space: str) -> np.ndarray:
    return np.nan_to_num(np.stack([items[number].vectors[space] for number in numbers]), nan=-1.0)


def _body(search: Search, items: list[Shown]) -> str:
    modalities = list(dict.fromkeys(one.modality for one in items))
    counts = ", ".join(f"{sum(one.modality == name for one in items)} {plural(name)}" for name in modalities)
    buttons = "".join(
        f'<button type="button" data-show="{escaped(name)}" aria-pressed="false">{escaped(plural(name))}</button>'
        for name in modalities
    )
    sections = "".join(_section(name, items) for name in modalities)
    near = nearest(items, search)
    data = {
        "modalities": [[name, plural(name)] for name in modalities],
        "items": [[one.modality, one.name] for one in items],
        "nearest": near,
        "first": _best_connected(near),
    }
    return (
        f"<header><h1>What the model finds alike</h1><p>{counts}. Choose one to see what of each other kind is "
        "nearest to it. Arrow keys move, Enter chooses.</p>"
        "<noscript><p>Choosing needs JavaScript; the items are below.</p></noscript></header>"
        f'<nav aria-label="Kinds of items">{buttons}</nav><main class="explorer">'
        f'<section id="near" aria-live="polite" aria-label="Nearest"></section><div id="items">{sections}</div></main>'
        f"{footer(search)}"
        f'<script type="application/json" id="data">{_json(data)}</script>'
    )


def _best_connected(near: list[dict[str, list[list[float]]]]) -> int:
    """The item that is near to the most kinds of items, and nearest to them."""
    return max(range(len(near)), key=lambda i: (len(near[i]), sum(found[0][1] for found in near[i].values())))


def _json(data: Any) -> str:
    """JSON that no text in it can end."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _section(modality: str, items: list[Shown]) -> str:
    mine = [(number, one) for number, one in enumerate(items) if one.modality == modality]
    tiles = "".join(_tile(number, one) for number, one in mine)
    return (
        f'<section data-of="{escaped(modality)}"><h2>{plural(modality).capitalize()}</h2><div>{tiles}</div></section>'
    )


def _tile(number: int, one: Shown) -> str:
    text = one.modality == TEXT or not one.thumb.picture
    inside = (
        escaped(one.name) if text else media(one.modality, dataclasses.replace(one.thumb, sound=None), name=one.name)
    )
    sound = f' data-sound="{one.thumb.sound}"' if one.thumb.sound else ""
    return (
        f'<button type="button" class="item {escaped(one.modality)}" data-number="{number}" aria-pressed="false"'
        f'{sound} title="{escaped(one.name)}">{inside}</button>'
    )
