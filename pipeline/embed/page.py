"""The frame of a page that opens offline: everything is in the file, and nothing else may be asked for."""

from __future__ import annotations

import html
from importlib import resources

# A browser refuses every request of such a page.
_POLICY = (
    "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)
# Modality → the words for its items.
PLURALS = {"image": "images", "video": "videos", "audio": "sounds", "text": "texts"}


def plural(modality: str) -> str:
    """The word for items of a modality; of added ones their name."""
    return PLURALS.get(modality, modality)


def escaped(text: object) -> str:
    """Text between tags and in quoted attributes."""
    return html.escape(str(text), quote=True)


def document(title: str, body: str, *, script: str = "") -> str:
    """A whole page. body: HTML. script: JavaScript that runs after it."""
    style = resources.files("pipeline.embed").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n{body}\n"
        + (f"<script>\n{script}</script>\n" if script else "")
        + "</body>\n</html>\n"
    )


def picture(uri: str, *, alt: str, width: int, height: int, kind: str = "") -> str:
    """An image of the page. kind: its class."""
    of_kind = f' class="{kind}"' if kind else ""
    return f'<img src="{uri}" alt="{escaped(alt)}" width="{width}" height="{height}"{of_kind}>'
