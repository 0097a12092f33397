"""Agreement of all processes of a run before a collective operation."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils

# Maximum number of bytes that a process tells the others.
_LINE_BYTES = 1024


def first_of_all_processes(problem: str | None) -> str | None:
    """The problem of the first process that has one, in all of them: otherwise the others would wait in the save."""
    if jax.process_count() == 1:
        return problem
    line = np.zeros(_LINE_BYTES, np.uint8)
    text = (problem or "").encode()[:_LINE_BYTES]
    line[: len(text)] = np.frombuffer(text, np.uint8)
    found = (bytes(x).rstrip(b"\0").decode(errors="replace") for x in multihost_utils.process_allgather(line))
    return next(filter(None, found), None)
