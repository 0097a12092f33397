"""Initial values drawn by numpy: the same on every backend and jax version, and no compilation to draw them.

Functions here have the form (key, shape, dtype) that flax layers take.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def normal(std: float) -> Callable[..., jax.Array]:
    """Normal with a given standard deviation."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
        if isinstance(key, jax.core.Tracer):
            return jnp.zeros(shape, dtype)  # abstract evaluation asks for the shape alone
        seed = int.from_bytes(np.asarray(jax.random.key_data(key)).tobytes(), "little")
        draw = np.random.Generator(np.random.Philox(key=seed)).standard_normal(shape, np.float32)
        return jnp.asarray(draw * np.float32(std), dtype)

    return init


def lecun_normal(*, fan_in: int) -> Callable[..., jax.Array]:
    """Normal of variance 1 / fan_in (the release's kernels)."""
    return normal(fan_in**-0.5)
