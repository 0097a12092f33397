"""The parts of a recipe's sections: strict pydantic models whose keys have a meaning."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic


class Section(pydantic.BaseModel):
    """Keys of a recipe. Unknown ones are errors, and so are values of another type."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def key(default: Any, meaning: str, **bounds: Any) -> Any:
    """A key with its default, or ``...`` if it must be given."""
    return pydantic.Field(default, description=meaning, **bounds)


Share = Annotated[float, pydantic.Field(ge=0, le=1)]
Weight = Annotated[float, pydantic.Field(ge=0)]
