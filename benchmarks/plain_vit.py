"""A plain Vision Transformer in Flax: the yardstick of ``model_step.py`` and ``scan.py``.

A Python loop over layers, separate query, key and value matrices, attention by two einsums and a softmax; no scan, no
rematerialisation, no fused projections. Sizes, precision and optimiser are those of the model it is compared with.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import nnx


class PlainAttention(nnx.Module):
    def __init__(self, width: int, num_heads: int, *, dtype, rngs: nnx.Rngs):
        self.num_heads = num_heads
        linear = {"use_bias": False, "dtype": dtype, "rngs": rngs}
        self.query, self.key, self.value, self.out = (nnx.Linear(width, width, **linear) for _ in range(4))

    def __call__(self, x) -> jax.Array:
        batch, num_tokens, width = x.shape
        query, key, value = (
            layer(x).reshape(batch, num_tokens, self.num_heads, -1) for layer in (self.query, self.key, self.value)
        )
        scores = jnp.einsum("bqhk,bshk->bhqs", query, key) / (width // self.num_heads) ** 0.5
        attended = jnp.einsum("bhqs,bshk->bqhk", jax.nn.softmax(scores), value)
        return self.out(attended.reshape(x.shape))


class PlainBlock(nnx.Module):
    def __init__(self, width: int, num_heads: int, mlp_dim: int, *, dtype, rngs: nnx.Rngs):
        norm = {"use_bias": False, "epsilon": 1e-6, "dtype": dtype, "rngs": rngs}
        self.attention_norm, self.mlp_norm = nnx.LayerNorm(width, **norm), nnx.LayerNorm(width, **norm)
        self.attention = PlainAttention(width, num_heads, dtype=dtype, rngs=rngs)
        self.wi = nnx.Linear(width, mlp_dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.wo = nnx.Linear(mlp_dim, width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x) -> jax.Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.wo(jax.nn.gelu(self.wi(self.mlp_norm(x))))


class PlainViT(nnx.Module):
    def __init__(self, config, *, num_tokens: int, patch_values: int, num_classes: int):
        dtype, rngs = jnp.dtype(config.dtype), nnx.Rngs(0)
        self.patch = nnx.Linear(patch_values, config.width, dtype=dtype, rngs=rngs)
        self.position = nnx.Param(jax.random.normal(rngs.params(), (num_tokens, config.width)))
        sizes = (config.width, config.num_heads, config.mlp_dim)
        self.blocks = nnx.List([PlainBlock(*sizes, dtype=dtype, rngs=rngs) for _ in range(config.depth)])
        self.norm = nnx.LayerNorm(config.width, epsilon=1e-6, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(config.width, num_classes, rngs=rngs)
        self.dtype = dtype

    def __call__(self, patches) -> jax.Array:
        """patches: (B, N, P) uint8."""
        pixels = (patches.astype(jnp.float32) / 127.5 - 1).astype(self.dtype)
        x = self.patch(pixels) + self.position[...].astype(self.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).astype(jnp.float32).mean(1))


def plain_step(vit: PlainViT, *, clip_norm: float, learning_rate: float) -> tuple[jax.stages.Wrapped, tuple]:
    """(jitted step, its first state): (state, patches, labels) → (state, loss). labels: (B,) class numbers."""
    graph, params = nnx.split(vit)
    optimizer = optax.chain(optax.clip_by_global_norm(clip_norm), optax.adam(learning_rate, eps=1e-7))

    def loss_fn(params, patches, labels) -> jax.Array:
        logits = nnx.merge(graph, params)(patches)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(state, patches, labels) -> tuple[tuple, jax.Array]:
        params, moments = state
        loss, grads = jax.value_and_grad(loss_fn)(params, patches, labels)
        updates, moments = optimizer.update(grads, moments)
        return (optax.apply_updates(params, updates), moments), loss

    return jax.jit(step, donate_argnums=0), (params, optimizer.init(params))
