"""Multi-head self-attention. Shape letters: B batch, N tokens, D width, H heads, K head_dim."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from model import sharding, tpu_attention
from model.config import ModelConfig
from model.initializers import lecun_normal
from model.layers import LayerNorm, Linear, affine, channels_first
from model.shapes import Array, Bool, Float

# Name of the plain form's output, for remat policies. They recognise the fused kernel's by the kernel itself, whose
# backward pass needs more than the output.
OUTPUT = "attended"
FUSED_KERNEL = "dot_product_attention_fwd"

# Minimum number of tokens for which the fused kernel is the faster one (benchmarks/gpu.py).
_MIN_FUSED_TOKENS = 64


class SelfAttention(nnx.Module):
    """Bias-free multi-head self-attention, with LayerNorm of queries and keys over head_dim if ``qk_norm``."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        self.head_dim = config.head_dim
        self.choice = config.attention
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
        width = x.shape[-1]
        if self.in_tpu_kernel(x):
            return self.out(jnp.swapaxes(self.attended_on_tpu(x, token_mask), 1, 2).reshape(-1, width)).reshape(x.shape)
        query, key, value = self.queries_keys_values(x)
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        attended = attend(query, key, value, token_mask, implementation=implementation(self.choice, query))
        return self.out(attended.reshape(-1, width)).reshape(x.shape)

    def in_tpu_kernel(self, x: jax.Array) -> bool:
        """Whether ``tpu_attention`` computes it: if asked for, or on TPUs by itself, where it takes the shape."""
        if not tpu_attention.supports(x.shape[1], self.head_dim, x.dtype):
            return False
        return self.choice == "pallas" or (self.choice == "auto" and sharding.platform() == "tpu")

    def attended_on_tpu(self, x: Float[Array, "B N D"], token_mask: Bool[Array, "B N"] | None) -> jax.Array:
        """(B, D, N): of all heads."""
        qkv = channels_first(x.astype(self.qkv.dtype), self.qkv.kernel[...])
        scales = (self.query_norm.scale[...], self.key_norm.scale[...]) if self.qk_norm else None
        parts = qkv.reshape(x.shape[0], 3, x.shape[2], x.shape[1])
        return checkpoint_name(tpu_attention.attend(parts, token_mask, scales, num_heads=self.num_heads), OUTPUT)

    def queries_keys_values(self, x: Float[Array, "B N D"]) -> list[Float[Array, "B N H K"]]:
        """From one product, or on GPUs from three.

        The fused kernel takes three separate arrays: one product would have to be split by copying, and its gradient
        joined by copying.
        """
        batch, num_tokens, width = x.shape
        # Batch and tokens are one axis for the matrix products: XLA's CPU compiler writes out a transposed copy of a
        # gradient that is summed over two axes, which cost a quarter of a step (benchmarks/model_step.py).
        x = x.reshape(-1, width)
        if sharding.platform() != "gpu":
            qkv = self.qkv(x).reshape(batch, num_tokens, 3, self.num_heads, self.head_dim)
            return [qkv[:, :, i] for i in range(3)]
        x = x.astype(self.qkv.dtype)
        parts = [affine(x, kernel, None) for kernel in jnp.split(self.qkv.kernel[...], 3, axis=-1)]
        return [part.reshape(batch, num_tokens, self.num_heads, self.head_dim) for part in parts]


def attend(query, key, value, token_mask: Bool[Array, "B N"] | None, *, implementation: str) -> jax.Array:
    """Attention (B, N, H, K) to the real tokens by a kernel, "xla" or "cudnn".

    cuDNN takes the number of a sample's real tokens in place of a mask, so these must come first, as in a text. All
    queries are computed, padding included, so both kernels return the same values there.
    """
    if implementation == "xla":
        mask = None if token_mask is None else token_mask[:, None, None, :]
        return checkpoint_name(jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="xla"), OUTPUT)
    # A sample without tokens must attend to something, or its values are not finite.
    lengths = None if token_mask is None else jnp.maximum(token_mask.sum(1, dtype=jnp.int32), 1)
    return jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=lengths, implementation="cudnn")


def implementation(choice: str, query) -> str:
    """The attention kernel for queries of a shape and type: "auto" is cuDNN's if it supports them, else XLA's; so is
    "pallas", which is not for these shapes (``SelfAttention.in_tpu_kernel``)."""
    if choice in ("xla", "cudnn"):
        return choice
    if sharding.platform() != "gpu" or not _is_ampere_or_later() or query.shape[1] < _MIN_FUSED_TOKENS:
        return "xla"
    like = jax.ShapeDtypeStruct(query.shape, query.dtype)
    try:
        # cuDNN's limits on type, head_dim and lengths are checked while tracing.
        jax.eval_shape(lambda q: jax.nn.dot_product_attention(q, q, q, implementation="cudnn"), like)
    except (RuntimeError, NotImplementedError, ValueError):
        return "xla"
    return "cudnn"


def _is_ampere_or_later() -> bool:
    """The fused kernel needs compute capability 8.0, which jax checks only when it compiles the kernel."""
    capability = str(getattr(jax.local_devices()[0], "compute_capability", "0"))
    return capability.split(".")[0].isdigit() and int(capability.split(".")[0]) >= 8
