"""The activation between the two products of a feed-forward network."""

from __future__ import annotations

import jax

from model.shapes import Array, Float


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU by its tanh approximation (the release's).

    Only x is kept for the backward pass, whatever the remat policy: jax's own derivative keeps four arrays of the
    model's widest size, and a scan over layers writes all of them to memory.
    """
    return jax.checkpoint(jax.nn.gelu, prevent_cse=False)(x)
