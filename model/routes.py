"""The expert that each token of a sample goes to, layer by layer: for people to look at.

Shape letters: N tokens, D width, L layers with experts, E experts, C capacity.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from model.encoder import Block, Encoder
from model.groups import encoder_group
from model.imp import Imp
from model.shapes import Array, Int


def routes(
    imp: Imp, params: dict, modality: str, tokens: Array, positions: Array, mask: Array | None = None
) -> Int[Array, "L N"]:
    """Of one sample, its tokens a routing group of their own: of the experts that took a token the one with the highest
    gate, -1 where none took it. (0, N) without experts.

    tokens (N, P), positions (N, axes), mask (N,): as for ``Imp.encode``, without the batch.
    """
    of_batch = None if mask is None else mask[None]
    x = imp.module(params, f"embed_{modality}").embed(tokens[None], positions[None])
    found = []
    for block, is_sparse in _blocks(imp.module(params, encoder_group(imp.config, modality))):
        if is_sparse:
            found.append(_taken_by(block, x, of_batch))
        x, _ = block(x, of_batch, group_samples=1)
    return jnp.stack(found) if found else jnp.zeros((0, x.shape[1]), jnp.int32)


def _blocks(encoder: Encoder) -> Iterator[tuple[Block, bool]]:
    """Yields (block, whether it is sparse) in the order of depth."""
    stacks = {name: nnx.split(getattr(encoder, name)) for name in ("dense", "sparse") if hasattr(encoder, name)}
    depths = {name: jax.tree.leaves(params)[0].shape[0] for name, (_, params) in stacks.items()}

    def block(name: str, index: int) -> Block:
        graph, params = stacks[name]
        return nnx.merge(graph, jax.tree.map(lambda p: p[index], params))

    for index in range(depths.get("dense", 0)):
        yield block("dense", index), False
        if encoder.dense_per_sparse and (index + 1) % encoder.dense_per_sparse == 0:
            yield block("sparse", index // encoder.dense_per_sparse), True
    if not encoder.dense_per_sparse:
        for index in range(depths.get("sparse", 0)):
            yield block("sparse", index), True


def _taken_by(block: Block, x: Array, mask: Array | None) -> Int[Array, " N"]:
    """The expert of each token of (1, N, D), before the block."""
    after_attention = x + block.attention(block.attention_norm(x), mask)
    routing = block.mlp.router(block.mlp_norm(after_attention), mask)
    gates, index = routing.gates[0], routing.index[0]
    of_tokens = jnp.zeros((gates.shape[0], x.shape[1]), gates.dtype)
    experts = jnp.arange(gates.shape[0])[:, None]
    of_tokens = of_tokens.at[experts, index].max(gates)
    return jnp.where(of_tokens.max(0) > 0, of_tokens.argmax(0), -1)
