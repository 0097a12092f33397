"""Keys of a recipe that other packages own: fields of frozen dataclasses, each with its meaning."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

try:
    from annotated_types import Ge, Interval
except ImportError:  # only pydantic reads them, which needs this package itself

    def Ge(ge: Any) -> None: ...

    def Interval(**bounds: Any) -> None: ...


FromOne = Annotated[int, Ge(1)]


def key(default: Any, meaning: str, **bounds: Any) -> Any:
    """A field of a dataclass that is a key of the recipe. default: ``...`` if the key must be given.

    bounds: ge, gt, le, lt, min_length, ... as ``pydantic.Field`` has them: pydantic reads both from the field's
    metadata, so that only ``pipeline/recipe`` has to know it.
    """
    about = {"description": meaning, **bounds}
    if default is ...:
        return dataclasses.field(metadata=about)
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=about)
    return dataclasses.field(default=default, metadata=about)
