"""What a request to an exported model gives, as lists, and what it gets, as names with probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import RequestError, some_of


def given(**arguments: Any) -> dict[str, list]:
    """The inputs of a request as lists."""
    found = {name: _listed(items) for name, items in arguments.items() if items is not None}
    if not found:
        raise RequestError(f"expected at least one of {', '.join(arguments)}, found none")
    return found


def _listed(items: Any) -> list:
    """A list of items; one item that is no list or tuple, nor an array of several, is a list of one."""
    if isinstance(items, str | Path) or hasattr(items, "getexif"):
        return [items]
    if isinstance(items, np.ndarray):
        raise RequestError("expected a list of items, found one array; put it into a list")
    return list(items)


def only(given: dict[str, list]) -> tuple[str, list]:
    """The one kind of input of a request."""
    if len(given) != 1:
        raise RequestError(f"expected one kind of input, found {some_of(given)}")
    return next(iter(given.items()))


def named(scores: np.ndarray, names: Sequence[str], objective: str) -> list[dict[str, float]]:
    """Name → probability of each row of scores, the likeliest first."""
    scores = scores.astype(np.float64)
    if objective == "sigmoid":
        probabilities = 1 / (1 + np.exp(-scores))
    else:
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        probabilities = powers / powers.sum(axis=1, keepdims=True)
    order = np.argsort(-probabilities, axis=1, kind="stable")
    return [{names[i]: float(row[i]) for i in ranks} for row, ranks in zip(probabilities, order, strict=True)]
