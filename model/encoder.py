"""The shared Transformer encoder: pre-LayerNorm blocks, some of them mixtures of experts, scanned over layers.

Shape letters: B batch, N tokens, D width. The encoder never learns which modality it sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from model import attention, moe, sharding
from model.activations import gelu
from model.attention import SelfAttention
from model.config import ModelConfig
from model.initializers import lecun_normal
from model.layers import LayerNorm, Linear
from model.moe import MoEFeedForward
from model.shapes import Array, Bool, Float

_AFTER_ATTENTION = "after_attention"
_NAMED_PRODUCTS = jax.checkpoint_policies.save_only_these_names(attention.OUTPUT, moe.HIDDEN, moe.OUTPUT)


def _products(primitive: Any, *args: Any, **params: Any) -> bool:
    """Saves the results of all matrix products, attention included, and of the experts' choice of tokens.

    Recomputed are norms, activations and the dispatch of tokens.
    """
    if primitive.name.startswith((attention.FUSED_KERNEL, "top_k")):
        return True
    of_weights = jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)
    return of_weights or _NAMED_PRODUCTS(primitive, *args, **params)


# Name → policy: the values of a block that are saved for the backward pass beside its input; the rest is recomputed.
# "full" saves nothing (paper section 3.1.1), "attention" the residual stream after attention, "dots" the results of
# matrix products with weights, "products" also those of attention and of experts, "none" everything. "auto" is
# "attention" unless ``step.compile_step`` has chosen another.
REMAT_POLICIES = {
    "auto": jax.checkpoint_policies.save_only_these_names(_AFTER_ATTENTION),
    "none": jax.checkpoint_policies.everything_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(_AFTER_ATTENTION),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "products": _products,
}


def _layer_norm(config: ModelConfig, *, use_bias: bool, rngs: nnx.Rngs) -> LayerNorm:
    return LayerNorm(config.width, use_bias=use_bias, dtype=jnp.dtype(config.dtype), rngs=rngs)


class FeedForward(nnx.Module):
    """width → mlp_dim → width with tanh-approximated GELU, no biases."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        width, mlp_dim = config.width, config.mlp_dim
        common = {"use_bias": False, "dtype": dtype, "rngs": rngs}
        self.wi = Linear(width, mlp_dim, kernel_init=lecun_normal(fan_in=width), **common)
        self.wo = Linear(mlp_dim, width, kernel_init=lecun_normal(fan_in=mlp_dim), **common)

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "B N D"], token_mask, *, group_samples: int) -> tuple[jax.Array, dict]:
        flat = x.reshape(-1, x.shape[-1])  # as in attention: one axis for the products
        return self.wo(gelu(self.wi(flat))).reshape(x.shape), {}


class Block(nnx.Module):
    """x + attention(LN x), then x + feed-forward(LN x); the feed-forward is dense or a mixture of experts."""

    def __init__(self, config: ModelConfig, *, sparse: bool, rngs: nnx.Rngs):
        self.attention_norm = _layer_norm(config, use_bias=False, rngs=rngs)
        self.attention = SelfAttention(config, rngs=rngs)
        self.mlp_norm = _layer_norm(config, use_bias=False, rngs=rngs)
        self.mlp = (MoEFeedForward if sparse else FeedForward)(config, rngs=rngs)

    def __call__(self, x, token_mask, *, group_samples: int) -> tuple[jax.Array, dict]:
        with jax.named_scope("norm"):
            normed = self.attention_norm(x)
        x = checkpoint_name(x + self.attention(normed, token_mask), _AFTER_ATTENTION)
        with jax.named_scope("norm"):
            normed = self.mlp_norm(x)
        update, statistics = self.mlp(normed, token_mask, group_samples=group_samples)
        return x + update, statistics


def _stack(config: ModelConfig, *, depth: int, sparse: bool, rngs: nnx.Rngs) -> Block:
    """``depth`` blocks with their parameters stacked on a leading axis, each from its own key."""
    blocks = [Block(config, sparse=sparse, rngs=rngs) for _ in range(depth)]
    stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *(nnx.state(block) for block in blocks))
    return nnx.merge(nnx.graphdef(blocks[0]), stacked)


def _unstacked(params) -> list:
    """The layers of a stack. One operation splits all of them, so that one operation joins their gradients."""
    leaves, tree = jax.tree.flatten(params)
    return [jax.tree.unflatten(tree, layer) for layer in zip(*map(jnp.unstack, leaves), strict=True)]


class Encoder(nnx.Module):
    """The shared encoder; parameter counts as in the paper's sizes (tests/model/test_config.py).

    ``dense`` and ``sparse`` hold the parameters of their layers in the order of depth, for either placement.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        num_sparse = len(config.sparse_layers)
        if config.depth > num_sparse:
            self.dense = _stack(config, depth=config.depth - num_sparse, sparse=False, rngs=rngs)
        if num_sparse:
            self.sparse = _stack(config, depth=num_sparse, sparse=True, rngs=rngs)
        self.norm = _layer_norm(config, use_bias=True, rngs=rngs)
        self.remat = config.remat
        self.scan = config.scan
        self.unroll_on_gpu = config.unroll_on_gpu
        interleaved = config.moe is not None and config.moe.placement == "interleaved"
        # Dense layers before each sparse one, where the two alternate in the depth.
        self.dense_per_sparse = config.depth // num_sparse - 1 if interleaved else 0

    def __call__(
        self, x: Float[Array, "B N D"], token_mask: Bool[Array, "B N"] | None = None, *, group_samples: int = 1
    ) -> tuple[jax.Array, dict]:
        """Returns (B, N, D) and the statistics of the sparse layers, stacked by layer (empty for a dense model)."""
        stacks = {name: nnx.split(getattr(self, name)) for name in ("dense", "sparse") if hasattr(self, name)}
        policy = REMAT_POLICIES[self.remat]

        def layer(name: str) -> Callable[[jax.Array, Any], tuple[jax.Array, dict]]:
            graph = stacks[name][0]

            def run(x: jax.Array, params: Any) -> tuple[jax.Array, dict]:
                block = nnx.merge(graph, sharding.gather_params(params))
                return block(sharding.shard_batch(x), token_mask, group_samples=group_samples)

            # Inside a scan XLA cannot merge the recomputation with the forward pass (CSE); unrolled it can.
            return run if self.remat == "none" else jax.checkpoint(run, policy=policy, prevent_cse=not self.scans)

        if self.dense_per_sparse:
            x, statistics = self._interleaved(x, stacks, layer)
        else:
            statistics = {}
            for name, (_, params) in stacks.items():
                x, statistics = self._over_layers(layer(name), x, params)
        with jax.named_scope("norm"):
            return self.norm(x), statistics

    @property
    def scans(self) -> bool:
        """Whether a stack of layers is one compiled body, on the devices in use."""
        return self.scan and not (self.unroll_on_gpu and sharding.platform() == "gpu")

    def _interleaved(self, x: jax.Array, stacks: dict, layer: Callable) -> tuple[jax.Array, dict]:
        """Super-blocks of some dense layers and a sparse one."""
        num_sparse = jax.tree.leaves(stacks["sparse"][1])[0].shape[0]
        dense = jax.tree.map(lambda p: p.reshape(num_sparse, -1, *p.shape[1:]), stacks["dense"][1])
        run_dense, run_sparse = layer("dense"), layer("sparse")

        def super_block(x: jax.Array, params: Any) -> tuple[jax.Array, dict]:
            for i in range(self.dense_per_sparse):
                x, _ = run_dense(x, jax.tree.map(lambda p, i=i: p[i], params[0]))
            return run_sparse(x, params[1])

        return self._over_layers(super_block, x, (dense, stacks["sparse"][1]))

    def _over_layers(self, body: Callable, x: jax.Array, params: Any) -> tuple[jax.Array, dict]:
        if self.scans:
            return jax.lax.scan(body, x, params)
        statistics = []
        for of_layer in _unstacked(params):
            x, found = body(x, of_layer)
            statistics.append(found)
        return x, jax.tree.map(lambda *layers: jnp.stack(layers), *statistics)
