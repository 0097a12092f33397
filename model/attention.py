"""Multi-head self-attention. Shape letters: B batch, N tokens, D width, H heads, K head_dim."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ModelConfig
from model.initializers import lecun_normal
from model.layers import LayerNorm, Linear
from model.shapes import Array, Bool, Float


class SelfAttention(nnx.Module):
    """Bias-free multi-head self-attention, with LayerNorm of queries and keys over head_dim where ``qk_norm``."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.num_heads, self.head_dim, self.choice = config.num_heads, config.head_dim, config.attention
        dtype = jnp.dtype(config.dtype)
        init = lecun_normal(fan_in=config.width)
        self.qkv = Linear(config.width, 3 * config.width, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs)
        self.out = Linear(config.width, config.width, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs)
        if config.qk_norm:
            # One scale over head_dim, shared by the heads, no bias (the release's form).
            self.query_norm = LayerNorm(config.head_dim, use_bias=False, dtype=dtype, rngs=rngs)
            self.key_norm = LayerNorm(config.head_dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.qk_norm = config.qk_norm

    @jax.named_scope("attention")
    def __call__(self, x: Float[Array, "B N D"], token_mask: Bool[Array, "B N"] | None) -> Float[Array, "B N D"]:
        """token_mask: True = a real token; nobody attends to the others."""
        batch, num_tokens, width = x.shape
        # Batch and tokens are one axis for the matrix products: XLA's CPU compiler writes out a transposed copy of a
        # gradient that is summed over two axes, which cost a quarter of a step (benchmarks/model_step.py).
        qkv = self.qkv(x.reshape(-1, width)).reshape(batch, num_tokens, 3, self.num_heads, self.head_dim)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        mask = None if token_mask is None else token_mask[:, None, None, :]
        kernel = implementation(self.choice, query, masked=mask is not None)
        attended = jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=kernel)
        return self.out(attended.reshape(-1, width)).reshape(x.shape)


def implementation(choice: str, query, *, masked: bool) -> str:
    """The attention kernel for queries of a shape and type: "auto" is cuDNN's wherever it takes them, else XLA's.

    Masked attention always stays with XLA: only texts have masks, and they are short.
    """
    if masked or choice == "xla":
        return "xla"
    if choice == "cudnn":
        return "cudnn"
    if jax.default_backend() != "gpu" or not _is_ampere_or_later():
        return "xla"
    like = jax.ShapeDtypeStruct(query.shape, query.dtype)
    try:
        # cuDNN's limits on type, head_dim and lengths are checked while tracing.
        jax.eval_shape(lambda q: jax.nn.dot_product_attention(q, q, q, implementation="cudnn"), like)
    except (RuntimeError, NotImplementedError, ValueError):
        return "xla"
    return "cudnn"


def _is_ampere_or_later() -> bool:
    """The fused kernel needs compute capability 8.0, which is checked no earlier than at its compilation."""
    capability = str(getattr(jax.local_devices()[0], "compute_capability", "0"))
    return capability.split(".")[0].isdigit() and int(capability.split(".")[0]) >= 8
