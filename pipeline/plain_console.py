"""The terminal for tables of a user's own words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def plain_console() -> Console:
    """A console that prints texts as they are: brackets are no markup, and words between colons no emoji."""
    from rich.console import Console

    return Console(markup=False, emoji=False)
