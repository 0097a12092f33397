"""The shared Transformer encoder: pre-LayerNorm blocks, dense first, Mixture-of-Experts last, each stack one scan.

Shape letters: B batch, N tokens, D width. The encoder never learns which modality it sees.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from model.attention import SelfAttention
from model.config import ModelConfig
from model.initializers import lecun_normal
from model.moe import MoEFeedForward

# What the backward pass keeps of a block: "full" keeps only its input (paper section 3.1.1), "none" everything.
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def _layer_norm(config: ModelConfig, *, use_bias: bool, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.width, use_bias=use_bias, epsilon=1e-6, dtype=jnp.dtype(config.dtype), rngs=rngs)


class FeedForward(nnx.Module):
    """width → mlp_dim → width with tanh-approximated GELU, no biases."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        width, mlp_dim = config.width, config.mlp_dim
        common = {"use_bias": False, "dtype": dtype, "rngs": rngs}
        self.wi = nnx.Linear(width, mlp_dim, kernel_init=lecun_normal(fan_in=width), **common)
        self.wo = nnx.Linear(mlp_dim, width, kernel_init=lecun_normal(fan_in=mlp_dim), **common)

    def __call__(self, x: Float[Array, "B N D"], token_mask, *, group_samples: int):
        return self.wo(jax.nn.gelu(self.wi(x))), {}


class Block(nnx.Module):
    """x + attention(LN x), then x + feed-forward(LN x); the feed-forward is dense or a mixture of experts."""

    def __init__(self, config: ModelConfig, *, sparse: bool, rngs: nnx.Rngs):
        self.attention_norm = _layer_norm(config, use_bias=False, rngs=rngs)
        self.attention = SelfAttention(config, rngs=rngs)
        self.mlp_norm = _layer_norm(config, use_bias=False, rngs=rngs)
        self.mlp = (MoEFeedForward if sparse else FeedForward)(config, rngs=rngs)

    def __call__(self, x, token_mask, *, group_samples: int):
        x = x + self.attention(self.attention_norm(x), token_mask)
        update, statistics = self.mlp(self.mlp_norm(x), token_mask, group_samples=group_samples)
        return x + update, statistics


def _stack(config: ModelConfig, *, depth: int, sparse: bool, rngs: nnx.Rngs) -> Block:
    """``depth`` blocks with their parameters stacked on a leading axis, each from its own key."""
    blocks = [Block(config, sparse=sparse, rngs=rngs) for _ in range(depth)]
    stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *(nnx.state(block) for block in blocks))
    return nnx.merge(nnx.graphdef(blocks[0]), stacked)


class Encoder(nnx.Module):
    """The shared encoder; parameter counts as in the paper's sizes (tests/model/test_config.py)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        num_sparse = config.moe.num_layers if config.moe else 0
        if config.depth > num_sparse:
            self.dense = _stack(config, depth=config.depth - num_sparse, sparse=False, rngs=rngs)
        if num_sparse:
            self.sparse = _stack(config, depth=num_sparse, sparse=True, rngs=rngs)
        self.norm = _layer_norm(config, use_bias=True, rngs=rngs)
        self.remat = config.remat

    def __call__(
        self, x: Float[Array, "B N D"], token_mask: Bool[Array, "B N"] | None = None, *, group_samples: int = 1
    ):
        """Returns (B, N, D) and the statistics of the sparse layers, stacked by layer (empty for a dense model)."""
        statistics = {}
        for name in ("dense", "sparse"):
            if hasattr(self, name):
                x, statistics = self._scan(getattr(self, name), x, token_mask, group_samples=group_samples)
        return self.norm(x), statistics

    def _scan(self, stacked: Block, x, token_mask, *, group_samples: int):
        graph, params = nnx.split(stacked)

        def body(carry, layer_params):
            return nnx.merge(graph, layer_params)(carry, token_mask, group_samples=group_samples)

        return jax.lax.scan(jax.checkpoint(body, policy=REMAT_POLICIES[self.remat], prevent_cse=False), x, params)
