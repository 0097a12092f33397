"""What a report takes from files that may hold anything: finite numbers, mappings, lists."""

from __future__ import annotations

import math


def number(value: object) -> float:
    """``value`` if it is a finite number, else NaN."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else math.nan


def mapping(value: object) -> dict:
    """``value`` if it is a mapping, with its keys as text, else an empty one."""
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else {}


def listed(value: object) -> list:
    """``value`` if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def records(value: object) -> list[dict]:
    """The mappings in a list."""
    return [mapping(item) for item in listed(value) if isinstance(item, dict)]
