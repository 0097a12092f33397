"""The terminal for tables of a user's own words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


# Control characters but for tabs and line feeds: a terminal would obey them.
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd")


def plain_console() -> Console:
    """A console that prints texts as they are: brackets are no markup, words between colons no emoji, and no text
    moves the cursor or changes colours."""
    from rich.console import Console
    from rich.text import Text

    class Plain(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(text.translate(_CONTROLS), **options)

    return Plain(markup=False, emoji=False)
