"""What a search has found, as a table in the terminal and as a page that opens offline."""

from __future__ import annotations

from pathlib import Path

from pipeline.data.modalities import TEXT
from pipeline.embed.page import document, escaped, picture, plural
from pipeline.embed.preparations import query_input
from pipeline.embed.search import Found, Hit, Query, Search
from pipeline.embed.thumbnails import Thumbnail, thumbnail
from pipeline.files import write_bytes
from pipeline.plain_console import plain_console

# Maximum bytes of pictures and sounds in a page; later items are shown by their names.
MAX_MEDIA_BYTES = 7_500_000
_ALT = {"image": "Picture", "video": "Film strip", "audio": "Spectrogram"}


def print_found(search: Search, found: Found) -> None:
    """Prints a table a modality, and a line for each that no space connects with the query."""
    from rich.table import Table

    console = plain_console()
    for modality, hits in found.hits.items():
        title = f"{plural(modality)} nearest to {_title(found.query)}, by {hits[0].space}"
        table = Table(title=title, title_justify="left")
        table.add_column("", justify="right")
        table.add_column("cosine", justify="right")
        table.add_column("text" if modality == TEXT else "words", overflow="fold")
        if modality != TEXT:
            table.add_column("source", overflow="fold")
        for rank, hit in enumerate(hits, 1):
            words = [_words(hit)] if modality == TEXT else [short(hit.caption or "", end=False), hit.source]
            table.add_row(str(rank), f"{hit.score:.3f}", *words)
        console.print(table)
    for line in notes(search, found):
        console.print(line)


def notes(search: Search, found: Found) -> list[str]:
    """Lines on what the search could not look at."""
    lines = [
        f"{plural(name)}: no common space connects {found.query.modality} and {name}; the model has "
        f"{', '.join(search.description.spaces)}"
        for name in found.unreachable
    ]
    if missing := search.missing_rows():
        lines.append(f"{missing:,} rows are not embedded yet: run imp embed again")
    return lines or ([] if found.hits else ["nothing was embedded"])


def write_page(search: Search, found: Found, path: Path) -> None:
    """Writes the page. Its media take at most ``MAX_MEDIA_BYTES``."""
    left = MAX_MEDIA_BYTES
    sections = []
    for modality, hits in found.hits.items():
        figures = []
        for rank, hit in enumerate(hits, 1):
            thumb = thumbnail(search, modality, hit.source, hit.prepared_as, (hit.start_s, hit.end_s))
            left -= thumb.num_bytes
            if left < 0:
                thumb = Thumbnail(why_not="left out: the page would be too large")
            figures.append(f"<li>{figure(hit, thumb, rank=rank)}</li>")
        sections.append(
            f"<section><h2>{plural(modality).capitalize()} <small>nearest of {found.compared[modality]:,}, by the "
            f'space {escaped(hits[0].space)}</small></h2><ol class="{list_class(modality)}">{"".join(figures)}</ol>'
            "</section>"
        )
    lines = "".join(f'<p class="soft">{escaped(line)}</p>' for line in notes(search, found))
    body = (
        f"<header><h1>Nearest to {escaped(_title(found.query))}</h1>{_query_figure(search, found.query)}{lines}"
        f"</header>\n<main>{''.join(sections)}</main>\n{footer(search)}"
    )
    write_bytes(path, document(f"Nearest to {_title(found.query)}", body).encode())


def list_class(modality: str) -> str:
    """The layout of a list: pictures are narrow, film strips and the rest wide, texts close together."""
    return {"image": "found", TEXT: "found wide texts"}.get(modality, "found wide")


def figure(hit: Hit, thumb: Thumbnail, *, rank: int) -> str:
    """One item with its rank, its cosine, and its words."""
    bar = f'<span class="score" aria-hidden="true"><i style="width:{max(0.0, hit.score):.0%}"></i></span>'
    if hit.modality == TEXT:
        words = f'<span class="words">{escaped(_words(hit))}</span>'
    else:
        words = escaped(hit.caption or "") + f" <small>{escaped(short(hit.id))}</small>"
    caption = f"<figcaption>{bar}<b>{rank}</b> · <b>{hit.score:.3f}</b> {words}</figcaption>"
    return f"<figure>{media(hit.modality, thumb, name=hit.caption or hit.id)}{caption}</figure>"


def media(modality: str, thumb: Thumbnail, *, name: str) -> str:
    """The picture and the player of an item."""
    if thumb.why_not:
        return f'<p class="soft">{escaped(thumb.why_not)}</p>'
    shown = ""
    if thumb.picture:
        alt = f"{_ALT.get(modality, modality)} of {name}"
        kind = "spectrogram" if modality == "audio" else ""
        shown = picture(thumb.picture, alt=alt, width=thumb.width, height=thumb.height, kind=kind)
    if thumb.sound:
        shown += (
            f'<audio controls preload="metadata" src="{thumb.sound}" aria-label="Sound of {escaped(name)}"></audio>'
        )
    return shown


def footer(search: Search) -> str:
    """Where the page comes from."""
    inputs = ", ".join(escaped(short_path(one.uri)) for one in search.description.inputs)
    return (
        f"<footer>Model of step {search.description.step}. Items: {inputs}. Cosines from −1 to 1 are ranked within a "
        "modality; those of two modalities are not comparable.</footer>"
    )


def short_path(uri: str) -> str:
    """The last two names of a path."""
    return "/".join(uri.rstrip("/").split("/")[-2:])


def short(text: str, *, limit: int = 60, end: bool = True) -> str:
    """The end of a long text, or its beginning."""
    if len(text) <= limit:
        return text
    return f"…{text[1 - limit :]}" if end else f"{text[: limit - 1]}…"


def _words(hit: Hit) -> str:
    return short(hit.source, limit=200, end=False)


def _title(query: Query) -> str:
    return f"“{short(query.value, limit=200, end=False)}”" if query.modality == TEXT else short(Path(query.value).name)


def _query_figure(search: Search, query: Query) -> str:
    if query.modality == TEXT:
        return ""
    space = next(iter(search.description.spaces))
    known = (query_input(search.encoder, query.modality, s, data_set="", beside="") for s in search.description.spaces)
    one = next((one for one in known if one), None)
    data_set = one.data_set if one else space
    shown = media(query.modality, thumbnail(search, query.modality, query.value, data_set), name="the query")
    return f'<div class="query"><figure>{shown}</figure></div>'
