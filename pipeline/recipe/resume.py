"""What a resume may change of the recipe that its run directory was made with."""

from __future__ import annotations

from typing import Any

from pipeline.errors import RequestError


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


_FREE_PREFIXES = ("cluster.", "logging.", "checkpoint.")


def check_resume(old: dict, new: dict) -> None:
    """Raises RequestError for a difference a resume may not make: any but cluster, logging, checkpoint, more steps."""
    for key, a, b in differences(old, new):
        if key.startswith(_FREE_PREFIXES) or (key == "train.num_steps" and b > a):
            continue
        raise RequestError(
            f"this run directory was made with {key} = {a!r}, the recipe now says {b!r}; "
            "use another --run-dir, or set it back"
        )
