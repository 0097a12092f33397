"""Layers that compute in bfloat16: what they give, and gradients of their parameters that are never rounded to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.layers import LayerNorm, affine, weight_product


def draw(*shape: int, seed: int, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def in_float64(x) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32), np.float64)


@pytest.mark.parametrize(
    ("formula", "x_shape", "weight_shape"), [("bnd,df->bnf", (3, 7, 5), (5, 4)), ("etd,edf->etf", (3, 7, 5), (3, 5, 4))]
)
def test_a_product_with_weights(formula, x_shape, weight_shape):
    """Dense weights and those of experts; the gradient is that of the rounded weight, in full."""
    x, weight = draw(*x_shape, seed=1, dtype="bfloat16"), draw(*weight_shape, seed=2)
    out, pull = jax.vjp(weight_product, x, weight)
    rounded = in_float64(weight.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(in_float64(out), np.einsum(formula, in_float64(x), rounded), rtol=2**-8, atol=1e-2)
    gradient = draw(*out.shape, seed=3, dtype="bfloat16")
    of_x, of_weight = pull(gradient)
    assert of_x.dtype == jnp.bfloat16 and of_weight.dtype == jnp.float32
    given, (left, right) = formula.split("->")[1], formula.split("->")[0].split(",")
    expected = np.einsum(f"{left},{given}->{right}", in_float64(x), in_float64(gradient))
    np.testing.assert_allclose(of_weight, expected, rtol=1e-5, atol=1e-5)
    expected = np.einsum(f"{given},{right}->{left}", in_float64(gradient), rounded)
    np.testing.assert_allclose(in_float64(of_x), expected, rtol=2**-8, atol=2e-2)


def test_a_bias_is_summed_in_float32():
    """257 tokens of a gradient of 1: bfloat16 stops at 256."""
    x, kernel, bias = jnp.zeros((257, 2), jnp.bfloat16), jnp.zeros((2, 3)), jnp.ones(3)
    out, pull = jax.vjp(lambda bias: affine(x, kernel, bias), bias)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(pull(jnp.ones_like(out))[0], [257.0] * 3)


def test_a_scale_counts_in_float32():
    """1 + 2^-8 is 1 in bfloat16, and 1 / sqrt(5) times it is nearest to 230 / 512, without it to 229 / 512."""
    norm = LayerNorm(4, dtype=jnp.bfloat16, use_bias=False, rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.full(4, 1 + 2**-8)
    out = norm(jnp.asarray([[-3.0, -1.0, 1.0, 3.0]], jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(jnp.float32), [[-172 / 128, -230 / 512, 230 / 512, 172 / 128]])


def test_the_gradient_of_a_scale_is_summed_in_float32():
    """257 rows (-1, 1), each with a gradient of 1; eps takes 5e-7 off."""
    graph, state = nnx.split(LayerNorm(2, dtype=jnp.bfloat16, use_bias=False, rngs=nnx.Rngs(0)))
    x = jnp.tile(jnp.asarray([-1.0, 1.0], jnp.bfloat16), (257, 1))
    gradient = jax.grad(lambda state: nnx.merge(graph, state)(x).astype(jnp.float32).sum())(state)
    np.testing.assert_allclose(nnx.to_pure_dict(gradient)["scale"], [-257.0, 257.0], rtol=1e-5)
