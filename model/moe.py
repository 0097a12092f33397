"""Mixture-of-Experts layer: router → dispatch → experts → combine.

As in the paper (section 4.1): experts choose their tokens (Zhou et al. 2022), capacity factor 1, no jitter, no
auxiliary loss. Tokens-choose routing (Switch, V-MoE) is there to compare.

Shape letters: B batch, N tokens, D width, G groups, S tokens of a group, E experts, C capacity, K experts a token
selects, F mlp_dim. A group is the set of tokens that compete for the experts' slots. Whoever chooses, a routing is the
same thing: for each of an expert's C slots a token and a gate, which is 0 for a slot that stays empty.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model import sharding
from model.activations import gelu
from model.config import ModelConfig, MoEConfig
from model.initializers import lecun_normal, normal
from model.layers import weight_product
from model.shapes import Array, Bool, Float, Int


def expert_capacity(num_tokens: int, moe: MoEConfig) -> int:
    """Slots of one expert in a group of ``num_tokens``: C = max(1, round(c n k / E)), k = 1 where experts choose."""
    selected = moe.num_selected if moe.router == "tokens_choose" else 1
    return min(num_tokens, max(1, round(moe.capacity_factor * num_tokens * selected / moe.num_experts)))


def group_samples(moe: MoEConfig, *, batch_size: int, num_tokens: int) -> int:
    """How many neighbouring samples share a routing group.

    Depends on the structure alone, never on the number of devices: the largest divisor of the batch (of a microbatch,
    where there are some) whose samples fit into ``group_size`` tokens.
    """
    if moe.group == "sample":
        return 1
    most = max(1, min(batch_size, moe.group_size // num_tokens))
    return max(n for n in range(1, most + 1) if batch_size % n == 0)


def dispatch_form(moe: MoEConfig) -> str:
    """ "auto": index wherever benchmarks/moe.py was run; the authors' einsum on TPUs, where gathers are slow."""
    if moe.dispatch != "auto":
        return moe.dispatch
    return "einsum" if jax.default_backend() == "tpu" else "index"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """gates, index (G, E, C): gate (float32) and token of every slot. probs, logits (G, S, E) float32.

    real (G, S): 1.0 for tokens that count.
    """

    gates: Float[Array, "G E C"]
    index: Int[Array, "G E C"]
    probs: Float[Array, "G S E"]
    logits: Float[Array, "G S E"]
    real: Float[Array, "G S"]


class Router(nnx.Module):
    """One bias-free matrix to the experts; gates are its raw softmax probabilities."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.moe = config.moe
        self.kernel = nnx.Param(normal(0.02)(rngs.params(), (config.width, config.moe.num_experts)))

    @jax.named_scope("router")
    def __call__(self, x: Float[Array, "G S D"], token_mask: Bool[Array, "G S"] | None) -> Routing:
        """Padding never competes, and of an expert's slots only the first round(c n_real / E), at least one, are
        filled, so that more padding changes nothing.
        """
        # The router is float32 whatever the compute type: near-ties would otherwise be decided by rounding.
        # Accelerators multiply float32 in fewer bits unless they are told not to.
        logits = jnp.matmul(x.astype(jnp.float32), self.kernel[...], precision=jax.lax.Precision.HIGHEST)
        probs = jax.nn.softmax(logits, axis=-1)
        if self.moe.route_padding:
            token_mask = None
        real = jnp.ones(x.shape[:2]) if token_mask is None else token_mask.astype(jnp.float32)
        choose = experts_choose if self.moe.router == "experts_choose" else tokens_choose
        gates, index = choose(probs, token_mask, self.moe)
        return Routing(gates=gates, index=index, probs=probs, logits=logits, real=real)


def experts_choose(probs: Float[Array, "G S E"], token_mask: Bool[Array, "G S"] | None, moe: MoEConfig):
    """Each expert takes its top-C tokens: (gates, index), each (G, E, C), the best token first."""
    capacity = expert_capacity(probs.shape[1], moe)
    scores = jnp.swapaxes(probs, 1, 2)
    if token_mask is None:
        return jax.lax.top_k(scores, capacity)
    gates, index = jax.lax.top_k(jnp.where(token_mask[:, None, :], scores, -jnp.inf), capacity)
    keep = jnp.arange(capacity) < _num_slots(token_mask, moe)[:, None, None]
    return jnp.where(keep & jnp.isfinite(gates), gates, 0.0), index


def tokens_choose(probs: Float[Array, "G S E"], token_mask: Bool[Array, "G S"] | None, moe: MoEConfig):
    """Each token asks its top-K experts for a slot: (gates, index), each (G, E, C), in the order of arrival.

    All first choices come before all second ones. Within a choice tokens come in the order of the group, or with
    ``batch_priority`` by their best probability, highest first (V-MoE). Those that find an expert full go without it.
    """
    num_groups, num_tokens, num_experts = probs.shape
    capacity = expert_capacity(num_tokens, moe)
    token_mask = jnp.ones((num_groups, num_tokens), bool) if token_mask is None else token_mask
    gates, experts = jax.lax.top_k(probs, moe.num_selected)
    order = jnp.broadcast_to(jnp.arange(num_tokens), (num_groups, num_tokens))
    if moe.batch_priority:
        order = jnp.argsort(jnp.where(token_mask, -gates[..., 0], jnp.inf), axis=1)  # stable: ties by position
    gates, experts = (jnp.take_along_axis(a, order[..., None], axis=1) for a in (gates, experts))
    asks = jax.nn.one_hot(experts, num_experts, dtype=jnp.int32)  # (G, S, K, E)
    asks = asks * jnp.take_along_axis(token_mask, order, axis=1)[..., None, None]
    arrivals = jnp.swapaxes(asks, 1, 2).reshape(num_groups, -1, num_experts)  # first choices, then second ones
    place = ((jnp.cumsum(arrivals, axis=1) - 1) * arrivals).sum(-1)  # (G, K S)
    asked = arrivals.sum(-1) > 0
    slots = _num_slots(token_mask, moe)[:, None]
    # What is turned away is written outside the table, and dropped.
    place = jnp.where(asked & (place < slots), place, capacity)
    expert, gate = (jnp.swapaxes(a, 1, 2).reshape(num_groups, -1) for a in (experts, gates))
    token = jnp.tile(order, (1, moe.num_selected))

    def table(values, expert, place):
        return jnp.zeros((num_experts, capacity), values.dtype).at[expert, place].set(values, mode="drop")

    return jax.vmap(table)(gate, expert, place), jax.vmap(table)(token, expert, place)


def _num_slots(token_mask: Bool[Array, "G S"], moe: MoEConfig) -> Int[Array, " G"]:
    """Slots that an expert may fill in each group."""
    # A table, so that the rounding is that of expert_capacity to the last bit.
    slots = np.array([expert_capacity(n, moe) for n in range(token_mask.shape[1] + 1)])
    return jnp.asarray(slots)[token_mask.sum(-1)]


class Experts(nnx.Module):
    """The weights of E independent feed-forward networks."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        experts, width, mlp_dim = config.moe.num_experts, config.width, config.mlp_dim
        self.wi = nnx.Param(lecun_normal(fan_in=width)(rngs.params(), (experts, width, mlp_dim)))
        self.wo = nnx.Param(lecun_normal(fan_in=mlp_dim)(rngs.params(), (experts, mlp_dim, width)))


class MoEFeedForward(nnx.Module):
    """A token no expert takes gets zero: only its residual goes on."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.router = Router(config, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)
        self.moe = config.moe

    def __call__(self, x: Float[Array, "B N D"], token_mask: Bool[Array, "B N"] | None, *, group_samples: int):
        """Returns the output (B, N, D) and the routing statistics of ``routing_statistics``."""
        batch, num_tokens, width = x.shape
        if batch % group_samples:
            raise ValueError(f"a batch of {batch} samples cannot be cut into routing groups of {group_samples} samples")
        groups = (batch // group_samples, group_samples * num_tokens)
        mask = None if token_mask is None else token_mask.reshape(groups)
        router_graph, router = nnx.split(self.router)

        def of_groups(tokens, mask, router, experts):
            routing = nnx.merge(router_graph, router)(tokens, mask)
            combine = combine_by_index if dispatch_form(self.moe) == "index" else combine_by_einsum
            return combine(tokens, routing, sharding.as_own(experts)), sharding.total(routing_sums(routing))

        weights = {"wi": self.experts.wi[...], "wo": self.experts.wo[...]}
        combined, sums = sharding.over_groups(of_groups, x.reshape(*groups, width), mask, router, weights)
        return combined.reshape(x.shape), routing_statistics(sums)


def combine_by_index(x: Float[Array, "G S D"], routing: Routing, experts: dict) -> Float[Array, "G S D"]:
    """Gathers each slot's token, and adds what the experts make of it to that token's place."""
    with jax.named_scope("dispatch"):
        taken = jax.vmap(lambda tokens, chosen: tokens[chosen])(x, routing.index)
    out = _run_experts(taken, experts)
    with jax.named_scope("combine"):
        out = out * routing.gates[..., None].astype(x.dtype)
        add = jax.vmap(lambda out, chosen: jnp.zeros(x.shape[1:], out.dtype).at[chosen].add(out))
        return add(out.reshape(x.shape[0], -1, x.shape[-1]), routing.index.reshape(x.shape[0], -1))


def combine_by_einsum(x: Float[Array, "G S D"], routing: Routing, experts: dict) -> Float[Array, "G S D"]:
    """The same with one-hot masks (G, E, C, S), as in the authors' release: quadratic in the size of a group."""
    with jax.named_scope("dispatch"):
        mask = jax.nn.one_hot(routing.index, x.shape[1], dtype=x.dtype)
        taken = jnp.einsum("gsd,gecs->gecd", x, mask)
    out = _run_experts(taken, experts)
    with jax.named_scope("combine"):
        return jnp.einsum("gecd,gecs->gsd", out * routing.gates[..., None].astype(x.dtype), mask)


@jax.named_scope("experts")
def _run_experts(taken: Float[Array, "G E C D"], experts: dict) -> Float[Array, "G E C D"]:
    """Slots to the devices of their experts, through them, and back."""
    num_groups, num_experts, capacity, width = taken.shape
    # An expert's slots in all groups are one axis, so that the gradients of its weights need no transposed copy.
    slots = sharding.to_experts(jnp.swapaxes(taken, 0, 1).reshape(num_experts, -1, width))
    hidden = gelu(weight_product(slots, experts["wi"]))
    out = sharding.from_experts(weight_product(hidden, experts["wo"]))
    return jnp.swapaxes(out.reshape(num_experts, num_groups, capacity, width), 0, 1)


@jax.named_scope("router")
def routing_sums(routing: Routing) -> dict[str, Array]:
    """The sums over tokens and slots that ``routing_statistics`` divides."""
    used = (routing.gates > 0).astype(jnp.float32)
    num_groups, group_tokens, num_experts = routing.probs.shape
    count = jax.vmap(lambda u, i: jnp.zeros(group_tokens).at[i].add(u))(
        used.reshape(num_groups, -1), routing.index.reshape(num_groups, -1)
    )
    real = routing.real
    best = jax.nn.one_hot(routing.probs.argmax(-1), num_experts) * real[..., None]
    return {
        "tokens": real.sum(),
        "unrouted": (real * (count == 0)).sum(),
        "slots": used.sum((0, 2)),
        "gates": routing.gates.sum(),
        "probs": (routing.probs * real[..., None]).sum((0, 1)),
        "best": best.sum((0, 1)),
        "z": (real * jax.nn.logsumexp(routing.logits, axis=-1) ** 2).sum(),
    }


def routing_statistics(sums: dict[str, Array]) -> dict[str, Array]:
    """What routing did, over the real tokens of the batch.

    unrouted_fraction: share of tokens that no expert took. slots_per_token: experts a token got, on average.
    confidence: mean gate of the used slots. expert_slots (E,): each expert's share of the used slots.
    expert_load (E,): each expert's share of the gate probability, so that preferences of a modality show although
    experts-choose fills all experts alike.
    z_loss: mean squared logsumexp of the logits (ST-MoE). load_balance: E Σ_e f_e P_e, f the share of tokens that like
    expert e best, P its mean probability (Switch); 1 when balanced.
    """
    num_tokens, num_slots = jnp.maximum(sums["tokens"], 1.0), jnp.maximum(sums["slots"].sum(), 1.0)
    load, best = sums["probs"] / num_tokens, sums["best"] / num_tokens
    return {
        "unrouted_fraction": sums["unrouted"] / num_tokens,
        "slots_per_token": sums["slots"].sum() / num_tokens,
        "confidence": sums["gates"] / num_slots,
        "expert_slots": sums["slots"] / num_slots,
        "expert_load": load,
        "z_loss": sums["z"] / num_tokens,
        "load_balance": load.size * (best * load).sum(),
    }


def auxiliary_loss(statistics: dict[str, Array], moe: MoEConfig) -> Float[Array, ""]:
    """The weighted losses of all sparse layers of one pass, from their stacked statistics."""
    return moe.z_loss_weight * statistics["z_loss"].sum() + moe.load_balance_weight * statistics["load_balance"].sum()
