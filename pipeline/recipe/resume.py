"""What a resume may change of the recipe that its run directory was made with."""

from __future__ import annotations

from typing import Any

from pipeline.errors import RequestError
from pipeline.recipe.reading import from_dict


def differences(old: dict, new: dict, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of everything that differs between two resolved recipes."""
    out = []
    for key in sorted(old.keys() | new.keys()):
        path, a, b = f"{prefix}{key}", old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += differences(a, b, f"{path}.")
        elif a != b:
            out.append((path, a, b))
    return out


_FREE = ("cluster", "logging", "checkpoint")


def check_resume(old: dict, new: dict) -> None:
    """Raises RequestError for a difference a resume may not make: any but cluster, logging, checkpoint, more steps.

    A key that came after ``old`` was written counts as its default.
    """
    try:
        old = from_dict({part: settings for part, settings in old.items() if part not in _FREE}).to_dict()
    except RequestError as e:
        raise RequestError(f"this run directory's recipe is not one of this version: {e}; use another --run-dir") from e
    for key, a, b in differences(old, new):
        if key.split(".")[0] in _FREE or (key == "train.num_steps" and b > a):
            continue
        raise RequestError(
            f"this run directory was made with {key} = {a!r}, the recipe now says {b!r}; "
            "use another --run-dir, or set it back"
        )
