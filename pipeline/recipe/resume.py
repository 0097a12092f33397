"""The changes that a resume may make to the recipe of its run directory."""

from __future__ import annotations

from typing import Any

from pipeline.credentials import redacted_values
from pipeline.errors import RequestError
from pipeline.recipe.reading import from_dict
from pipeline.recipe.settings import Recipe


def differences(old: dict, new: dict, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of everything that differs between two resolved recipes."""
    out = []
    for key in sorted(old.keys() | new.keys()):
        path = f"{prefix}{key}"
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += differences(a, b, f"{path}.")
        elif a != b:
            out.append((path, a, b))
    return out


# Sections that any resume may change.
_FREE = ("cluster", "logging", "checkpoint", "resume")


def from_stored(stored: dict) -> Recipe:
    """The recipe of a checkpoint or run directory, perhaps written by an older version.

    Keys that this version no longer has are dropped from sections that nothing learned depends on; elsewhere they are
    an error. Raises RequestError.
    """
    known = {part: vars(Recipe.model_fields[part].default) for part in _FREE}
    return from_dict(
        {
            part: {key: value for key, value in settings.items() if key in known[part]} if part in known else settings
            for part, settings in stored.items()
        }
    )


def check_resume(old: dict, new: dict) -> list[str]:
    """Lines on how the mixture changes. Raises RequestError for a difference a resume may not make.

    It may change cluster, logging, checkpoint and take more steps; with ``resume.allow_mixture_change`` also which
    tasks and data sets there are, weights, the sampler and what is evaluated. A key that came after ``old`` was written
    counts as its default.
    """
    try:
        old = from_stored(old).to_dict()
    except RequestError as e:
        raise RequestError(f"this run directory's recipe is not one of this version: {e}; use another --run-dir") from e
    lines = []
    # Stored recipes are without credentials, so other ones are no difference.
    for key, a, b in differences(redacted_values(old), redacted_values(new)):
        if key.split(".")[0] in _FREE or (key == "train.num_steps" and b > a):
            continue
        change = _mixture_change(key, a, b)
        if change and new["resume"]["allow_mixture_change"]:
            lines.append(change)
            continue
        more = (
            ", set it back, or allow it with --set resume.allow_mixture_change=true" if change else ", or set it back"
        )
        raise RequestError(
            f"this run directory was made with {key} = {_short(a)}, the recipe now says {_short(b)}; "
            f"use another --run-dir{more}"
        )
    return lines


def _mixture_change(key: str, a: Any, b: Any) -> str | None:
    """A difference in words; None if it is not one of the mixture."""
    part, *rest = key.split(".")
    if part == "modalities" and (a is None or b is None):
        return f"{key} " + ("is new" if a is None else "is gone")
    if part in ("tasks", "data_sets") and len(rest) == 1:
        if a is None:
            return f"{key} is new"
        return f"{key} is gone" if b is None else f"{key} changed"
    if part in ("sampler", "evaluate") or (part == "tasks" and rest[1:] == ["weight"]):
        return f"{key}: {_short(a)} is now {_short(b)}"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
