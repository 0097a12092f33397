"""The TPU's attention kernel, interpreted, against plain attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import attention, tpu_attention
from model.attention import SelfAttention

HEADS, HEAD_DIM = 3, 16


def normed(x, scale):
    """LayerNorm over the last axis, without a bias."""
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale


def plain(qkv, mask, scales):
    """(B, D, N): the softmax written out."""
    batch, _, width, num_tokens = qkv.shape
    query, key, value = (jnp.swapaxes(qkv[:, i].reshape(batch, HEADS, HEAD_DIM, num_tokens), 2, 3) for i in range(3))
    if scales:
        query, key = normed(query, scales[0]), normed(key, scales[1])
    scores = jnp.einsum("bhqk,bhsk->bhqs", query, key, precision="highest") / HEAD_DIM**0.5
    if mask is not None:
        scores = jnp.where(mask[:, None, None, :], scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = jnp.einsum("bhqs,bhsk->bhkq", weights, value, precision="highest")
    return out.reshape(batch, width, num_tokens)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(
    ("num_tokens", "lengths"),
    [
        (128, None),
        (256, (256, 1)),
        pytest.param(640, (513, 128), marks=pytest.mark.slow),
        pytest.param(1024, (1024, 3), marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_are_those_of_plain_attention(jit, num_tokens, lengths, normalise):
    keys = jax.random.split(jax.random.key(num_tokens), 4)
    qkv = jax.random.normal(keys[0], (2, 3, HEADS * HEAD_DIM, num_tokens)) * 2 + 0.5
    weight = jax.random.normal(keys[1], (2, HEADS * HEAD_DIM, num_tokens))
    scales = tuple(1 + 0.3 * jax.random.normal(k, (HEAD_DIM,)) for k in keys[2:]) if normalise else None
    mask = None if lengths is None else jnp.arange(num_tokens) < jnp.array(lengths)[:, None]
    sizes = []
    for function in (plain, lambda *a: tpu_attention.attend(*a, num_heads=HEADS)):
        # Squared, so that the gradient is not that of a linear function alone.
        def loss(qkv, scales, function=function):
            out = function(qkv, mask, scales)
            return (weight * out**2).sum(), out

        gradients, out = jit(jax.grad(loss, (0, 1), has_aux=True))(qkv, scales)
        sizes.append((out, *jax.tree.leaves(gradients)))
    for expected, found in zip(*sizes, strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5 * float(jnp.abs(expected).max()))


def test_a_sample_without_tokens_is_finite():
    qkv = jax.random.normal(jax.random.key(0), (1, 3, HEADS * HEAD_DIM, 128))
    none = jnp.zeros((1, 128), bool)
    found = tpu_attention.attend(qkv, none, None, num_heads=HEADS)
    np.testing.assert_allclose(found, jnp.broadcast_to(qkv[:, 2].mean(-1, keepdims=True), found.shape), atol=1e-5)


def test_in_bfloat16_it_is_as_near_to_float32_as_plain_operations_are(jit, tiny):
    config = tiny(width=64, num_heads=4, head_dim=16, qk_norm=True)
    x = jax.random.normal(jax.random.key(1), (4, 128, 64))
    mask = jnp.arange(128) < jnp.array([128, 100, 7, 1])[:, None]

    def values(dtype: str, choice: str):
        layer = SelfAttention(dataclasses.replace(config, dtype=dtype, attention=choice), rngs=nnx.Rngs(0))
        assert layer.in_tpu_kernel(x.astype(dtype)) == (choice == "pallas")
        graph, params = nnx.split(layer)

        def loss(params, x):
            return (nnx.merge(graph, params)(x, mask).astype(jnp.float32) ** 2).sum()

        return jax.tree.leaves(jit(jax.grad(loss, (0, 1)))(params, x.astype(dtype)))

    exact, plain, kernel = values("float32", "xla"), values("bfloat16", "xla"), values("bfloat16", "pallas")
    for a, b, c in zip(exact, plain, kernel, strict=True):
        error = [float(jnp.linalg.norm(v.astype(jnp.float32) - a)) for v in (b, c)]
        assert error[1] <= 1.3 * error[0]
        assert error[1] <= 0.02 * float(jnp.linalg.norm(a))


@pytest.mark.parametrize(
    ("num_tokens", "dtype", "expected"),
    [(256, "bfloat16", True), (16, "bfloat16", False), (4096, "bfloat16", False), (256, "float32", False)],
)
def test_shapes_that_it_does_not_take_are_computed_by_plain_operations(tiny, num_tokens, dtype, expected):
    layer = SelfAttention(tiny(width=32, head_dim=16, attention="pallas", dtype=dtype), rngs=nnx.Rngs(0))
    x = jnp.zeros((1, num_tokens, 32), dtype)
    assert layer.in_tpu_kernel(x) == expected
    assert attention.implementation("pallas", x) == "xla"
