"""The HTML of every page: self-contained, without a script, it requests nothing from the network."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.report.elements import Html, escape
from pipeline.report.style import STYLE


def page(*, title: str, header: Html, sections: Mapping[str, Html]) -> str:
    """Makes the whole page; a section without content says so.

    A policy in its head makes the browser refuse every request and script, whatever a file contains.
    """
    anchors = {name: name.lower().replace(" ", "-") for name in sections}
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for name, anchor in anchors.items())
    missing = Html('<p class="quiet">not available</p>')
    body = "\n".join(
        f'<section id="{anchors[name]}"><h2>{escape(name)}</h2>{content or missing}</section>'
        for name, content in sections.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:;
 form-action 'none'; base-uri 'none'">
<title>{escape(title)}</title><style>{STYLE}</style></head>
<body><main><header><h1>{escape(title)}</h1>{header}</header><nav aria-label="Sections">{links}</nav>
{body}</main></body></html>
"""
