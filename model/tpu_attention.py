"""Attention of a TPU as one kernel: scores, softmax and the norms of queries and keys never leave the chip.

Shape letters: B batch, H heads, K head_dim, D = H K width, N tokens, C queries of a chunk. All arrays have their tokens
last, the layout in which the TPU compiler wants a head_dim below 128: a reduction over K or over the keys then runs
along the rows of a register, and a head is a slice of rows. Matrix products carry more than their factors: keys have a
further row for the padding, which gives a padded key its score, values one of ones, which sums the weights of a query.
As in FlashAttention (arXiv 2205.14135) the backward pass computes the weights again; a head's keys fit whole, so that
no running maximum is needed. One grid step has some heads of a sample.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from model import sharding
from model.shapes import Array, Bool, Float

FORWARD, BACKWARD = "attention_forward", "attention_backward"

# Tokens of a register's row, of which their number must be a multiple.
_LANES = 128
# Maximum number of tokens: a head's keys by a chunk of queries must fit into the chip's memory, several times.
_MAX_TOKENS = 2048
# Maximum number of queries that are compared with all keys at a time.
_CHUNK = 512
# Rows that are put to a head's rows: those of a register of bfloat16 values.
_FURTHER = 16
# Maximum bytes of the rows of all heads of a grid step.
_STEP_BYTES = 256 << 10
# Score of a padded key. Finite, so that a sample without tokens attends to all of them alike.
_PADDED = -1e30
_EPSILON = 1e-6


def supports(num_tokens: int, head_dim: int, dtype) -> bool:
    """Whether the kernel takes heads of this shape and type."""
    return num_tokens % _LANES == 0 and num_tokens <= _MAX_TOKENS and head_dim % _FURTHER == 0 and dtype == jnp.bfloat16


def attend(
    qkv: Float[Array, "B 3 D N"],
    token_mask: Bool[Array, "B N"] | None,
    scales: tuple[jax.Array, jax.Array] | None,
    *,
    num_heads: int,
) -> Float[Array, "B D N"]:
    """Attention to the real tokens. scales: of the LayerNorm of queries and of keys, (K,) each; None: no norm.

    Other devices than TPUs interpret the kernel, for tests.
    """
    batch, _, width, num_tokens = qkv.shape
    bias = jnp.zeros((batch, num_tokens)) if token_mask is None else jnp.where(token_mask, 0.0, _PADDED)
    columns = () if scales is None else tuple(scale[:, None] for scale in scales)
    kernel = functools.partial(_attention, width // num_heads)
    return sharding.map_rows(kernel, (qkv, bias[:, None, :]), columns)


def heads_of_step(num_heads: int, head_dim: int, num_tokens: int, *, itemsize: int = 2) -> int:
    """Heads of one grid step."""
    fitting = _STEP_BYTES // (head_dim * num_tokens * itemsize)
    return max(h for h in range(1, num_heads + 1) if num_heads % h == 0 and h <= max(1, fitting))


def heads_at_once(num_heads: int) -> int:
    """Heads that one round of a step's loop computes side by side, of those of a grid step."""
    return 2 - num_heads % 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(head_dim: int, qkv: jax.Array, bias: jax.Array, *scales: jax.Array) -> jax.Array:
    return _forward(head_dim, qkv, bias, *scales)[0]


def _forward(head_dim: int, qkv: jax.Array, bias: jax.Array, *scales: jax.Array) -> tuple[jax.Array, tuple]:
    batch, _, width, num_tokens = qkv.shape
    call, inputs, rows = _call(head_dim, qkv, scales)
    out = jax.ShapeDtypeStruct((batch, width, num_tokens), qkv.dtype)
    attended = call(_forward_kernel, FORWARD, inputs, rows, out)(qkv, bias, *scales)
    return attended, (qkv, bias, *scales)


def _backward(head_dim: int, residuals: tuple, gradient: jax.Array) -> tuple:
    qkv, bias, *scales = residuals
    batch, _, width, _ = qkv.shape
    call, inputs, rows = _call(head_dim, qkv, scales)
    steps = width // rows.block_shape[1]
    sums = jax.ShapeDtypeStruct((batch, steps, 2 * head_dim, _LANES), jnp.float32)
    outputs = [inputs[0], pl.BlockSpec((1, 1, 2 * head_dim, _LANES), lambda b, h: (b, h, 0, 0))]
    shapes = [jax.ShapeDtypeStruct(qkv.shape, qkv.dtype), sums]
    of_qkv, sums = call(_backward_kernel, BACKWARD, [*inputs, rows], outputs, shapes)(*residuals, gradient)
    of_scales = sums.sum((0, 1, 3)).reshape(2, head_dim, 1) if scales else ()
    return of_qkv, jnp.zeros_like(bias), *of_scales


_attention.defvjp(_forward, _backward)


def _call(head_dim: int, qkv: jax.Array, scales):
    """(a pallas_call of a kernel for these arrays, the blocks of its inputs, that of an array (B, D, N))."""
    batch, _, width, num_tokens = qkv.shape
    heads = heads_of_step(width // head_dim, head_dim, num_tokens, itemsize=qkv.dtype.itemsize)
    inputs = [
        pl.BlockSpec((1, 3, heads * head_dim, num_tokens), lambda b, h: (b, 0, h, 0)),
        pl.BlockSpec((1, 1, num_tokens), lambda b, h: (b, 0, 0)),
        *[pl.BlockSpec((head_dim, 1), lambda b, h: (0, 0))] * len(scales),
    ]

    def call(kernel, name: str, in_specs, out_specs, out_shape):
        return pl.pallas_call(
            functools.partial(kernel, heads=heads, head_dim=head_dim, normed=bool(scales)),
            grid=(batch, width // (heads * head_dim)),
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=out_shape,
            name=name,
            interpret=sharding.platform() != "tpu",
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        )

    return call, inputs, pl.BlockSpec((1, heads * head_dim, num_tokens), lambda b, h: (b, h, 0))


def _forward_kernel(qkv, bias, *rest, heads: int, head_dim: int, normed: bool) -> None:
    *scales, out = rest

    def head(rows) -> None:
        of_head = _Head(qkv, bias, scales if normed else None, rows, head_dim)
        for chunk in of_head.chunks():
            weights = of_head.weights(chunk).astype(out.dtype)
            summed = _dot(of_head.values, weights, 1, 0)
            out[0, rows, chunk] = (summed[:head_dim] / summed[head_dim : head_dim + 1]).astype(out.dtype)

    _each_head(head, heads, head_dim)


def _backward_kernel(qkv, bias, *rest, heads: int, head_dim: int, normed: bool) -> None:
    *scales, gradient, of_qkv, sums = rest
    sums[...] = jnp.zeros_like(sums)
    dtype = of_qkv.dtype

    def head(rows) -> None:
        of_head = _Head(qkv, bias, scales if normed else None, rows, head_dim)
        of_queries, of_keys, of_values = [], 0.0, 0.0
        for chunk in of_head.chunks():
            weights = of_head.weights(chunk)
            rounded = weights.astype(dtype)
            summed = _dot(of_head.values, rounded, 1, 0)
            inverse = 1.0 / summed[head_dim : head_dim + 1]
            # The weights stay undivided by their sum: the gradient is divided in their place.
            given = gradient[0, rows, chunk].astype(jnp.float32) * inverse
            mean = (given * summed[:head_dim]).sum(0, keepdims=True) * inverse
            given = given.astype(dtype)
            # In two parts, so that rounding to bfloat16 loses nothing; values have ones in both rows.
            high = mean.astype(dtype).astype(jnp.float32)
            given_and_mean = jnp.concatenate([given, _further(given.shape[1], [-high, high - mean], dtype)], 0)
            of_scores = (weights * _dot(of_head.values, given_and_mean, 0, 0)).astype(dtype)
            of_queries.append(_dot(of_head.keys[:head_dim], of_scores, 1, 0))
            of_keys += _dot(of_head.queries[:head_dim, chunk], of_scores, 1, 1)
            of_values += _dot(given, rounded, 1, 1)
        of_qkv[0, 2, rows, :] = of_values.astype(dtype)
        # Queries are in units of log2(e) / sqrt(K).
        of_both = (jnp.concatenate(of_queries, 1) * head_dim**-0.5, of_keys * math.log(2))
        if not normed:
            for i in range(2):
                of_qkv[0, i, rows, :] = of_both[i].astype(dtype)
            return
        totals = []
        for i in range(2):
            normal, reciprocal = of_head.normal[i]
            product = of_both[i] * normal
            totals.append(sum(product[:, c : c + _LANES] for c in range(0, product.shape[1], _LANES)))
            of_input = _norm_backward(of_both[i] * scales[i][...], normal, reciprocal)
            of_qkv[0, i, rows, :] = of_input.astype(dtype)
        sums[0, 0] += jnp.concatenate(totals, 0)

    _each_head(head, heads, head_dim)


def _each_head(head, heads: int, head_dim: int) -> None:
    """Calls ``head`` with the rows of every head of a grid step."""

    def body(h, carry):
        head(pl.ds(pl.multiple_of(h * head_dim, head_dim), head_dim))
        return carry

    jax.lax.fori_loop(0, heads, body, None, unroll=heads_at_once(heads))


class _Head:
    """One head of one sample: queries and keys (K + 16, N), normalised and with the row of the padding, values
    (K + 16, N) with rows of ones; normal: (normalised, reciprocal of the deviation) of queries and of keys."""

    def __init__(self, qkv, bias, scales, rows, head_dim: int):
        queries, keys, values = (qkv[0, i, rows, :] for i in range(3))
        dtype, num_tokens = values.dtype, values.shape[1]
        unit = head_dim**-0.5 * math.log2(math.e)
        queries, keys = queries.astype(jnp.float32), keys.astype(jnp.float32)
        if scales is not None:
            self.normal = _norm(queries), _norm(keys)
            queries, keys = (n[0] * s[...] for n, s in zip(self.normal, scales, strict=True))
        self.queries = jnp.concatenate([(queries * unit).astype(dtype), _further(num_tokens, [1.0], dtype)], 0)
        self.keys = jnp.concatenate([keys.astype(dtype), _further(num_tokens, [bias[0]], dtype)], 0)
        self.values = jnp.concatenate([values, _further(num_tokens, [1.0, 1.0], dtype)], 0)

    def chunks(self) -> list[slice]:
        """Slices of the queries."""
        num_tokens = self.queries.shape[1]
        size = max(c for c in range(_LANES, _CHUNK + 1, _LANES) if num_tokens % c == 0)
        return [slice(c, c + size) for c in range(0, num_tokens, size)]

    def weights(self, chunk: slice) -> jax.Array:
        """(N, C) float32: the softmax weights of every key for each query, undivided by their sum."""
        scores = _dot(self.keys, self.queries[:, chunk], 0, 0)
        return jnp.exp2(scores - scores.max(0, keepdims=True))


def _dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """The product over one axis of each, in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _further(num_tokens: int, first: list, dtype) -> jax.Array:
    """(16, N): the given rows, then zeros."""
    row = jax.lax.broadcasted_iota(jnp.int32, (_FURTHER, num_tokens), 0)
    out = jnp.zeros((_FURTHER, num_tokens), jnp.float32)
    for i, values in enumerate(first):
        out = jnp.where(row == i, values, out)
    return out.astype(dtype)


def _norm(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x with mean 0 and variance 1 over its rows, the reciprocal of the deviation)."""
    centred = x - x.mean(0, keepdims=True)
    reciprocal = jax.lax.rsqrt((centred * centred).mean(0, keepdims=True) + _EPSILON)
    return centred * reciprocal, reciprocal


def _norm_backward(gradient: jax.Array, normal: jax.Array, reciprocal: jax.Array) -> jax.Array:
    """The gradient of what ``_norm`` took."""
    along = (gradient * normal).mean(0, keepdims=True)
    return (gradient - gradient.mean(0, keepdims=True) - normal * along) * reciprocal
