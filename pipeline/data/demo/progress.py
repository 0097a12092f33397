"""Shows a build: a progress bar on a terminal, elsewhere one line for each set."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress


class BuildProgress:
    """The progress of one set after the other. enabled: show it."""

    def __init__(self, *, enabled: bool):
        self._enabled = enabled
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        if self._enabled and sys.stdout.isatty():
            from rich.progress import Progress

            self._bar = Progress()
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    @contextlib.contextmanager
    def watch(self, name: str, *, total: int) -> Iterator[Callable[[int], None]]:
        """Yields a function that takes the number of newly completed files and may be called from any thread."""
        if self._bar is None:
            yield lambda count: None
        else:
            task = self._bar.add_task(f"demo corpus: {name}", total=total)
            yield lambda count: self._bar.advance(task, count)

    def line(self, text: str) -> None:
        """Prints a line unless a bar is shown."""
        if self._enabled and self._bar is None:
            print(text, flush=True)
