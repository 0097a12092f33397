"""Experts-choose Mixture-of-Experts layer (Zhou et al. 2022).

As in the paper (section 4.1): capacity factor 1, no jitter, no auxiliary loss.

Shape letters: B batch, N tokens, D width, G groups, S tokens of a group, E experts, C capacity, F mlp_dim.
A group is the set of tokens that compete for the experts' slots.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from model.config import ModelConfig, MoEConfig
from model.initializers import lecun_normal, normal


def expert_capacity(num_tokens: int, moe: MoEConfig) -> int:
    """Slots of one expert in a group of ``num_tokens``: C = max(1, round(c n / E))."""
    return min(num_tokens, max(1, round(moe.capacity_factor * num_tokens / moe.num_experts)))


def group_samples(moe: MoEConfig, *, global_batch_size: int, num_tokens: int) -> int:
    """How many neighbouring samples share a routing group.

    Depends on the structure alone, never on the number of devices: the largest divisor of the global batch whose
    samples fit into ``group_size`` tokens.
    """
    if moe.group == "sample":
        return 1
    most = max(1, min(global_batch_size, moe.group_size // num_tokens))
    return max(n for n in range(1, most + 1) if global_batch_size % n == 0)


class ExpertsChooseRouter(nnx.Module):
    """Each expert takes its top-C tokens of a group; gates are the raw softmax probabilities over the experts."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.moe = config.moe
        self.kernel = nnx.Param(normal(0.02)(rngs.params(), (config.width, config.moe.num_experts)))

    def __call__(self, x: Float[Array, "G S D"], token_mask: Bool[Array, "G S"] | None):
        """Returns gates (G, E, C) float32, token indices (G, E, C) and the probabilities (G, S, E).

        Padding never competes, and an expert keeps only its first round(c n_real / E) slots (at least one), so that
        more padding changes nothing.
        """
        capacity = expert_capacity(x.shape[1], self.moe)
        # The router is float32 whatever the compute type: near-ties would otherwise be decided by rounding.
        logits = x.astype(jnp.float32) @ self.kernel[...]
        probs = jax.nn.softmax(logits, axis=-1)
        scores = jnp.swapaxes(probs, 1, 2)
        if token_mask is None:
            gates, index = jax.lax.top_k(scores, capacity)
            return gates, index, probs
        gates, index = jax.lax.top_k(jnp.where(token_mask[:, None, :], scores, -jnp.inf), capacity)
        # A table, so that the rounding is that of expert_capacity to the last bit.
        slots = np.array([expert_capacity(n, self.moe) for n in range(x.shape[1] + 1)])
        num_slots = jnp.asarray(slots)[token_mask.sum(-1)]
        keep = jnp.arange(capacity) < num_slots[:, None, None]
        return jnp.where(keep & jnp.isfinite(gates), gates, 0.0), index, probs


class Experts(nnx.Module):
    """E independent feed-forward networks, one batched matrix product each way."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        experts, width, mlp_dim = config.moe.num_experts, config.width, config.mlp_dim
        self.wi = nnx.Param(lecun_normal(fan_in=width)(rngs.params(), (experts, width, mlp_dim)))
        self.wo = nnx.Param(lecun_normal(fan_in=mlp_dim)(rngs.params(), (experts, mlp_dim, width)))
        self.dtype = jnp.dtype(config.dtype)

    def __call__(self, x: Float[Array, "G E C D"]) -> Float[Array, "G E C D"]:
        wi, wo = self.wi[...].astype(self.dtype), self.wo[...].astype(self.dtype)
        hidden = jax.nn.gelu(jnp.einsum("gecd,edf->gecf", x, wi))
        return jnp.einsum("gecf,efd->gecd", hidden, wo)


class MoEFeedForward(nnx.Module):
    """Router, gather, experts, scatter-add. A token no expert takes gets zero: only its residual goes on."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.router = ExpertsChooseRouter(config, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)

    def __call__(self, x: Float[Array, "B N D"], token_mask: Bool[Array, "B N"] | None, *, group_samples: int):
        """Returns the output (B, N, D) and the routing statistics of ``routing_statistics``."""
        batch, num_tokens, width = x.shape
        if batch % group_samples:
            raise ValueError(f"a batch of {batch} samples cannot be cut into routing groups of {group_samples} samples")
        groups = (batch // group_samples, group_samples * num_tokens)
        grouped = x.reshape(*groups, width)
        mask = None if token_mask is None else token_mask.reshape(groups)
        gates, index, probs = self.router(grouped, mask)
        taken = jax.vmap(lambda tokens, chosen: tokens[chosen])(grouped, index)
        expert_out = self.experts(taken) * gates[..., None].astype(x.dtype)
        combine = jax.vmap(lambda out, chosen: jnp.zeros((groups[1], width), out.dtype).at[chosen].add(out))
        combined = combine(expert_out.reshape(groups[0], -1, width), index.reshape(groups[0], -1))
        return combined.reshape(x.shape), routing_statistics(gates, index, probs, mask)


def routing_statistics(gates, index, probs, token_mask) -> dict[str, Array]:
    """What routing did, over the real tokens of the batch.

    unrouted_fraction: share of tokens that no expert took. confidence: mean gate of the used slots.
    expert_load (E,): each expert's share of the gate probability, so that preferences of a modality show although
    experts-choose fills all experts alike.
    """
    num_groups, group_tokens = probs.shape[:2]
    used = (gates > 0).astype(jnp.float32)
    count = jax.vmap(lambda u, i: jnp.zeros(group_tokens).at[i].add(u))(
        used.reshape(num_groups, -1), index.reshape(num_groups, -1)
    )
    real = jnp.ones_like(count) if token_mask is None else token_mask.astype(jnp.float32)
    num_real = jnp.maximum(real.sum(), 1.0)
    return {
        "unrouted_fraction": (real * (count == 0)).sum() / num_real,
        "confidence": gates.sum() / jnp.maximum(used.sum(), 1.0),
        "expert_load": (probs * real[..., None]).sum((0, 1)) / num_real,
    }
