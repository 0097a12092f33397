"""The activation between the two products of a feed-forward network."""

from __future__ import annotations

import jax

from model.shapes import Array, Float


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU by its tanh approximation (the release's).

    For the backward pass only x is kept, whatever the remat policy: as jax differentiates it, four arrays of the widest
    size in the model would be, and a scan over layers writes out what it keeps.
    """
    return jax.checkpoint(jax.nn.gelu, prevent_cse=False)(x)
