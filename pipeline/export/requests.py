"""What a request to an exported model gives, as lists, and what it gets, as names with probabilities."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.prompts import has_a_place
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


def class_names(classes: Sequence[str]) -> tuple[str, ...]:
    """The names of the classes to choose between. A text would be taken for a list of its letters."""
    if isinstance(classes, str):
        raise RequestError(f"classes: expected a list of names, found the text {classes!r}")
    names = tuple(classes)
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise RequestError(f"classes: expected names, found {some_of(map(repr, names)) or 'none'}")
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise RequestError(f"classes: expected different names, found {twice[0]!r} more than once")
    return names


def sentences(prompts: Sequence[str] | None, default: Sequence[str]) -> tuple[str, ...]:
    """The prompts to fill with each class."""
    found = tuple(default if prompts is None else [prompts] if isinstance(prompts, str) else prompts)
    wrong = [prompt for prompt in found if not (isinstance(prompt, str) and has_a_place(prompt))]
    if wrong or not found:
        raise RequestError(
            f"prompts: expected sentences with {{}} in place of the class, found {repr(wrong[0]) if wrong else 'none'}"
        )
    return found


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
