"""How a room declares the keys of a recipe that it owns: frozen dataclasses whose fields say what they mean."""

from __future__ import annotations

import dataclasses
from typing import Any


def key(default: Any, meaning: str, **bounds: Any) -> Any:
    """A field of a dataclass that is a key of the recipe.

    bounds: ge, gt, le, lt, min_length, ... as ``pydantic.Field`` has them: pydantic reads both from the field's
    metadata, so that only ``pipeline/recipe`` has to know it.
    """
    return dataclasses.field(default=default, metadata={"description": meaning, **bounds})
