"""Array annotations such as Float[Array, "B N D"]: jaxtyping's, which tests check; nothing without it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, UInt8
else:
    try:
        from jaxtyping import Array, Bool, Float, Int, UInt8
    except ImportError:
        from jax import Array

        class _Unchecked:
            def __class_getitem__(cls, _):
                return cls

        Bool = Float = Int = UInt8 = _Unchecked

__all__ = ["Array", "Bool", "Float", "Int", "UInt8"]
