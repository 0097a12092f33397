"""Multi-head self-attention. Shape letters: B batch, N tokens, D width, H heads, K head_dim."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from model.config import ModelConfig
from model.initializers import lecun_normal


class SelfAttention(nnx.Module):
    """Bias-free multi-head self-attention, with LayerNorm of queries and keys over head_dim where ``qk_norm``."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        dtype = jnp.dtype(config.dtype)
        init = lecun_normal(fan_in=config.width)
        self.qkv = nnx.Linear(config.width, 3 * config.width, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs)
        self.out = nnx.Linear(config.width, config.width, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs)
        if config.qk_norm:
            # One scale over head_dim, shared by the heads, no bias (the release's form).
            self.query_norm = nnx.LayerNorm(config.head_dim, use_bias=False, epsilon=1e-6, dtype=dtype, rngs=rngs)
            self.key_norm = nnx.LayerNorm(config.head_dim, use_bias=False, epsilon=1e-6, dtype=dtype, rngs=rngs)
        self.qk_norm = config.qk_norm

    def __call__(self, x: Float[Array, "B N D"], token_mask: Bool[Array, "B N"] | None) -> Float[Array, "B N D"]:
        """token_mask: True = a real token; nobody attends to the others."""
        batch, num_tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, num_tokens, 3, self.num_heads, self.head_dim)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        mask = None if token_mask is None else token_mask[:, None, None, :]
        attended = jax.nn.dot_product_attention(query, key, value, mask=mask)
        return self.out(attended.reshape(batch, num_tokens, width))
