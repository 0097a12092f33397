"""States and batches to time a step with: noise in the shapes and types of real ones, made on the device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from model.sharding import path_keys
from model.structure import Structure


def fill(shapes, shardings=None) -> dict:
    """A state of a started run, drawn on the device: initialisers draw on the host, minutes for the largest."""

    def value(path, x, key) -> jax.Array:
        names = path_keys(path)
        if "params" not in names or names[-1] == "bias":
            return jnp.zeros(x.shape, x.dtype)
        if names[-1] in ("scale", "tau"):
            return jnp.ones(x.shape, x.dtype)
        return 0.02 * jax.random.normal(key, x.shape, x.dtype)

    def draw() -> dict:
        keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))
        return jax.tree.map_with_path(lambda path, x: value(path, x, next(keys)), shapes)

    return jax.jit(draw, out_shardings=shardings)()


def arrays(structure: Structure, place: jax.sharding.Sharding | None = None) -> dict:
    """A batch of noise on the device, or where ``place`` says; texts are between a quarter full and full."""
    rng = np.random.default_rng(0)

    def value(path, x) -> np.ndarray:
        if x.dtype == np.bool_:
            lengths = rng.integers(x.shape[1] // 4, x.shape[1] + 1, (x.shape[0], 1))
            return np.arange(x.shape[1]) < lengths
        if path_keys(path)[-1] == "labels":
            return np.eye(x.shape[1], dtype=x.dtype)[rng.integers(0, x.shape[1], x.shape[0])]
        if path_keys(path)[-1] == "tokens" and x.ndim == 3:
            return rng.integers(0, 256, x.shape).astype(x.dtype)
        high = 2**30 if path_keys(path)[-1] == "positive_ids" else 8
        return rng.integers(0, high, x.shape).astype(x.dtype)

    return jax.device_put(jax.tree.map_with_path(value, structure.batch_shapes()), place)
