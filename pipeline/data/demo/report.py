"""What a build shows: a progress bar on a terminal, otherwise one line for each set."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self


class Reporter:
    """Shows the progress of one set after the other; says nothing if not `enabled`."""

    def __init__(self, *, enabled: bool):
        self.enabled = enabled
        self.bar = None

    def __enter__(self) -> Self:
        if self.enabled and sys.stdout.isatty():
            from rich.progress import Progress

            self.bar = Progress()
            self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.stop()

    @contextmanager
    def watch(self, name: str, *, total: int) -> Iterator[Callable[[int], None]]:
        """Yields a function that takes how many more files are done; any thread may call it."""
        if self.bar is None:
            yield lambda count: None
        else:
            task = self.bar.add_task(f"demo corpus: {name}", total=total)
            yield lambda count: self.bar.advance(task, count)

    def line(self, text: str) -> None:
        """Prints a line where there is no bar."""
        if self.enabled and self.bar is None:
            print(text, flush=True)
