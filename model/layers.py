"""Layers that compute in the type of the activations; their parameters and the gradients of these are float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from model.shapes import Array, Float


class LayerNorm(nnx.LayerNorm):
    """nnx.LayerNorm over the last axis that multiplies by its float32 scale before it rounds."""

    def __init__(self, num_features: int, *, dtype, use_bias: bool, rngs: nnx.Rngs):
        keep = {"promote_dtype": lambda arrays, dtype: (arrays[0].astype(dtype), *arrays[1:])}
        super().__init__(num_features, epsilon=1e-6, use_bias=use_bias, dtype=dtype, rngs=rngs, **keep)


class Linear(nnx.Linear):
    """nnx.Linear whose weights get their gradients in float32."""

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        return affine(x.astype(self.dtype), self.kernel[...], self.bias[...] if self.use_bias else None)


def affine(x: Float[Array, "... D"], kernel: Float[Array, "D F"], bias: Float[Array, " F"] | None) -> jax.Array:
    """x @ kernel + bias in the type of x."""
    product = weight_product(x, kernel)
    # Added in float32: the gradient of a bias is a sum over all tokens and devices.
    return product if bias is None else (product.astype(bias.dtype) + bias).astype(x.dtype)


def weight_product(x: Float[Array, "... D"], weight: Float[Array, "... D F"]) -> Float[Array, "... F"]:
    """x @ weight in the type of x, for a float32 weight (D, F), or (E, D, F) with x (E, T, D).

    The gradient of the weight comes out of its product in float32. As jax differentiates a cast to bfloat16 it would be
    rounded to bfloat16 first, and summed over devices in it.
    """
    return x @ weight if x.dtype == weight.dtype else _mixed_product(x, weight)


def _in_type_of_x(x: jax.Array, weight: jax.Array) -> jax.Array:
    return x @ weight.astype(x.dtype)


_mixed_product = jax.custom_vjp(_in_type_of_x)


def _forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Not by way of _mixed_product, in which remat policies would not see a matrix product.
    return _in_type_of_x(x, weight), (x, weight)


def _backward(residuals: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = residuals
    of_x = gradient @ jnp.swapaxes(weight.astype(x.dtype), -1, -2)
    batch = tuple(range(weight.ndim - 2))
    summed = tuple(range(weight.ndim - 2, x.ndim - 1))
    dimensions = ((summed, summed), (batch, batch))
    return of_x, jax.lax.dot_general(x, gradient, dimensions, preferred_element_type=weight.dtype)


_mixed_product.defvjp(_forward, _backward)


def channels_first(x: Float[Array, "B N D"], weight: Float[Array, "D F"]) -> Float[Array, "B F N"]:
    """``weight_product`` with tokens last.

    Batch and tokens stay two axes, also in its gradients: as one they would have to be laid out anew on TPUs.
    """
    return _product_channels_first(x, weight) if x.dtype == weight.dtype else _mixed_channels_first(x, weight)


def _product_channels_first(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.einsum("bnd,df->bfn", x, weight.astype(x.dtype))


_mixed_channels_first = jax.custom_vjp(_product_channels_first)


def _forward_channels_first(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product_channels_first(x, weight), (x, weight)


def _backward_channels_first(
    residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = residuals
    of_x = jnp.einsum("bfn,df->bnd", gradient, weight.astype(x.dtype))
    return of_x, jnp.einsum("bnd,bfn->df", x, gradient, preferred_element_type=weight.dtype)


_mixed_channels_first.defvjp(_forward_channels_first, _backward_channels_first)
