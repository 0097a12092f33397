"""Mixture-of-Experts layer: route → dispatch → experts → combine.

As in the paper (section 4.1): experts choose their tokens (Zhou et al. 2022), capacity factor 1, no jitter, no
auxiliary loss. Tokens-choose routing (Switch, V-MoE) is offered for comparison.

Shape letters: B batch, N tokens, D width, G groups, S tokens of a group, E experts, C capacity, K experts a token
selects, F mlp_dim. A group is the set of tokens that compete for the experts' slots. Whoever chooses, a routing is the
same thing: for each of an expert's C slots a token and a gate, which is 0 for a slot that stays empty.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from model import sharding
from model.activations import gelu
from model.config import ModelConfig, MoEConfig
from model.initializers import lecun_normal, normal
from model.layers import weight_product
from model.shapes import Array, Bool, Float, Int

# Names, for remat policies, of the experts' hidden activations before GELU and of their outputs.
HIDDEN, OUTPUT = "expert_hidden", "expert_output"

# Maximum number of tokens in a group for which multiplying with one-hot masks takes at most 2 % longer on a GPU than
# moving tokens (benchmarks/gpu.py).
_MAX_TOKENS_BY_MASK = 512

# Of the router's product. Six products of bfloat16 parts have the accuracy of float32 and use the matrix units.
_PRECISION = {"gpu": jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X6}


def expert_capacity(num_tokens: int, moe: MoEConfig) -> int:
    """Slots of one expert in a group of ``num_tokens``: C = max(1, round(c n k / E)), k = 1 if experts choose."""
    selected = moe.num_selected if moe.router == "tokens_choose" else 1
    return min(num_tokens, max(1, round(moe.capacity_factor * num_tokens * selected / moe.num_experts)))


def effective_capacity_factor(num_tokens: int, moe: MoEConfig) -> float:
    """The capacity factor that a group of ``num_tokens`` has once each expert's slots are a whole number."""
    selected = moe.num_selected if moe.router == "tokens_choose" else 1
    return moe.num_experts * expert_capacity(num_tokens, moe) / (num_tokens * selected)


def group_samples(moe: MoEConfig, *, batch_size: int, num_tokens: int) -> int:
    """The number of neighbouring samples that share a routing group.

    Depends on the structure alone, never on the number of devices: the largest divisor of the batch (or of the
    microbatch) whose samples fit into ``group_size`` tokens.
    """
    if moe.group == "sample":
        return 1
    limit = max(1, min(batch_size, moe.group_size // num_tokens))
    return max(n for n in range(1, limit + 1) if batch_size % n == 0)


def dispatch_form(moe: MoEConfig, group_tokens: int) -> str:
    """The form for groups of that size: "index" or "einsum".

    "auto" is index on CPUs (benchmarks/moe.py), einsum on TPUs, where gathers are slow, and on GPUs einsum for small
    groups: it is deterministic, adding by index is not.
    """
    if moe.dispatch != "auto":
        return moe.dispatch
    small = group_tokens <= _MAX_TOKENS_BY_MASK
    return {"tpu": "einsum", "gpu": "einsum" if small else "index"}.get(sharding.platform(), "index")


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
        """Padding is never routed.

        Each expert fills only its first max(1, round(c n_real / E)) slots, so adding padding changes no result.
        """
        # The router is float32 whatever the compute type: near-ties would otherwise be decided by rounding.
        # Accelerators multiply float32 in fewer bits unless they are told not to.
        precision = _PRECISION.get(sharding.platform(), jax.lax.Precision.HIGHEST)
        logits = jnp.matmul(x.astype(jnp.float32), self.kernel[...], precision=precision)
        probs = jax.nn.softmax(logits, axis=-1)
        if self.moe.route_padding:
            token_mask = None
        real = jnp.ones(x.shape[:2]) if token_mask is None else token_mask.astype(jnp.float32)
        choose = experts_choose if self.moe.router == "experts_choose" else tokens_choose
        gates, index = choose(probs, token_mask, self.moe)
        return Routing(gates=gates, index=index, probs=probs, logits=logits, real=real)


def experts_choose(
    probs: Float[Array, "G S E"], token_mask: Bool[Array, "G S"] | None, moe: MoEConfig
) -> tuple[Float[Array, "G E C"], Int[Array, "G E C"]]:
    """Each expert takes its top-C tokens: (gates, index), each (G, E, C), the best token first."""
    capacity = expert_capacity(probs.shape[1], moe)
    scores = jnp.swapaxes(probs, 1, 2)
    if token_mask is None:
        return _top(scores, capacity)
    gates, index = _top(jnp.where(token_mask[:, None, :], scores, -jnp.inf), capacity)
    keep = jnp.arange(capacity) < _num_slots(token_mask, moe)[:, None, None]
    return jnp.where(keep & jnp.isfinite(gates), gates, 0.0), index


def _top(scores: Float[Array, "G E S"], capacity: int) -> tuple[Float[Array, "G E C"], Int[Array, "G E C"]]:
    """The highest scores of each expert and their tokens, (G, E, C)."""
    gates, index = jax.lax.top_k(scores, capacity)
    if sharding.platform() == "cpu":
        return gates, index
    # Picked out by comparison: the gradient of top_k adds by index, which takes longer and has no fixed order.
    chosen = index[..., None] == jnp.arange(scores.shape[-1])
    return jnp.where(chosen, scores[:, :, None], 0.0).sum(-1), index


def tokens_choose(
    probs: Float[Array, "G S E"], token_mask: Bool[Array, "G S"] | None, moe: MoEConfig
) -> tuple[Float[Array, "G E C"], Int[Array, "G E C"]]:
    """Each token asks its top-K experts for a slot: (gates, index), each (G, E, C), in the order of arrival.

    All first choices come before all second ones. Within a choice tokens come in the order of the group, or with
    ``batch_priority`` by their best probability, highest first (V-MoE). Those that find an expert full go without it.
    """
    num_groups, num_tokens, num_experts = probs.shape
    capacity = expert_capacity(num_tokens, moe)
    token_mask = jnp.ones((num_groups, num_tokens), bool) if token_mask is None else token_mask
    gates, experts = jax.lax.top_k(probs, moe.num_selected)
    order = _arrival_order(gates, token_mask, moe)
    gates, experts = (jnp.take_along_axis(a, order[..., None], axis=1) for a in (gates, experts))
    place = _place_of(experts, jnp.take_along_axis(token_mask, order, axis=1), num_experts=num_experts)
    # Tokens that are turned away are written outside the table, which drops them.
    place = jnp.where(place < _num_slots(token_mask, moe)[:, None], place, capacity)
    expert, gate = (jnp.swapaxes(a, 1, 2).reshape(num_groups, -1) for a in (experts, gates))
    token = jnp.tile(order, (1, moe.num_selected))

    def table(values: jax.Array, expert: jax.Array, place: jax.Array) -> jax.Array:
        return jnp.zeros((num_experts, capacity), values.dtype).at[expert, place].set(values, mode="drop")

    return jax.vmap(table)(gate, expert, place), jax.vmap(table)(token, expert, place)


def _arrival_order(gates: Float[Array, "G S K"], token_mask: Bool[Array, "G S"], moe: MoEConfig) -> Int[Array, "G S"]:
    """The tokens of each group in the order in which they ask. gates: of a token's experts, the best first."""
    order = jnp.broadcast_to(jnp.arange(gates.shape[1]), gates.shape[:2])
    if not moe.batch_priority:
        return order
    return jnp.argsort(jnp.where(token_mask, -gates[..., 0], jnp.inf), axis=1)  # stable: ties by position


def _place_of(experts: Int[Array, "G S K"], asks: Bool[Array, "G S"], *, num_experts: int) -> Int[Array, "G N"]:
    """(G, K S): the number of earlier arrivals at the same expert, all first choices before the second ones.

    Tokens that do not ask get a number beyond any slot. experts, asks: in the order of arrival.
    """
    chosen = jax.nn.one_hot(experts, num_experts, dtype=jnp.int32) * asks[..., None, None]  # (G, S, K, E)
    arrivals = jnp.swapaxes(chosen, 1, 2).reshape(experts.shape[0], -1, num_experts)
    place = ((jnp.cumsum(arrivals, axis=1) - 1) * arrivals).sum(-1)
    return jnp.where(arrivals.sum(-1) > 0, place, jnp.iinfo(jnp.int32).max)


def _num_slots(token_mask: Bool[Array, "G S"], moe: MoEConfig) -> Int[Array, " G"]:
    """Slots that an expert may fill in each group."""
    # A table, so that the rounding is that of expert_capacity to the last bit.
    slots = np.array([expert_capacity(n, moe) for n in range(token_mask.shape[1] + 1)])
    return jnp.asarray(slots)[token_mask.sum(-1)]


class Experts(nnx.Module):
    """The weights of E independent feed-forward networks."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        experts = config.moe.num_experts
        width, mlp_dim = config.width, config.mlp_dim
        self.wi = nnx.Param(lecun_normal(fan_in=width)(rngs.params(), (experts, width, mlp_dim)))
        self.wo = nnx.Param(lecun_normal(fan_in=mlp_dim)(rngs.params(), (experts, mlp_dim, width)))


class MoEFeedForward(nnx.Module):
    """A token no expert takes gets zero: only its residual goes on."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.router = Router(config, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)
        self.moe = config.moe

    def __call__(
        self, x: Float[Array, "B N D"], token_mask: Bool[Array, "B N"] | None, *, group_samples: int
    ) -> tuple[jax.Array, dict]:
        """Returns the output (B, N, D) and the routing statistics of ``routing_statistics``."""
        batch, num_tokens, width = x.shape
        if batch % group_samples:
            raise ValueError(f"a batch of {batch} samples cannot be cut into routing groups of {group_samples} samples")
        groups = (batch // group_samples, group_samples * num_tokens)
        mask = None if token_mask is None else token_mask.reshape(groups)
        router_graph, router = nnx.split(self.router)

        dispatch, combine = DISPATCH[dispatch_form(self.moe, groups[1])]

        def of_groups(tokens: jax.Array, mask: Any, router: Any, experts: Any) -> tuple[jax.Array, dict]:
            routing = nnx.merge(router_graph, router)(tokens, mask)
            out = run_experts(dispatch(tokens, routing), sharding.as_own(experts))
            return combine(out, routing), sharding.psum(routing_sums(routing))

        weights = {"wi": self.experts.wi[...], "wo": self.experts.wo[...]}
        combined, sums = sharding.map_groups(of_groups, x.reshape(*groups, width), mask, router, weights)
        return combined.reshape(x.shape), routing_statistics(sums)


@jax.named_scope("dispatch")
def gather_slots(x: Float[Array, "G S D"], routing: Routing) -> Float[Array, "G E C D"]:
    """Each slot's token, by its index."""
    return jax.vmap(lambda tokens, chosen: tokens[chosen])(x, routing.index)


@jax.named_scope("combine")
def scatter_add(out: Float[Array, "G E C D"], routing: Routing) -> Float[Array, "G S D"]:
    """Adds the experts' outputs, times their gates, at the positions of their tokens."""
    num_groups, width = out.shape[0], out.shape[-1]
    num_tokens = routing.probs.shape[1]
    out = out * routing.gates[..., None].astype(out.dtype)
    add = jax.vmap(lambda out, chosen: jnp.zeros((num_tokens, width), out.dtype).at[chosen].add(out))
    return add(out.reshape(num_groups, -1, width), routing.index.reshape(num_groups, -1))


@jax.named_scope("dispatch")
def gather_by_mask(x: Float[Array, "G S D"], routing: Routing) -> Float[Array, "G E C D"]:
    """``gather_slots`` with one-hot masks, as in the authors' release: quadratic in the size of a group."""
    return jnp.einsum("gsd,gecs->gecd", x, _mask(routing, x.dtype))


@jax.named_scope("combine")
def combine_by_mask(out: Float[Array, "G E C D"], routing: Routing) -> Float[Array, "G S D"]:
    """``scatter_add`` with one-hot masks."""
    out = out * routing.gates[..., None].astype(out.dtype)
    return jnp.einsum("gecd,gecs->gsd", out, _mask(routing, out.dtype))


def _mask(routing: Routing, dtype) -> Float[Array, "G E C S"]:
    return jax.nn.one_hot(routing.index, routing.probs.shape[1], dtype=dtype)


# Form → (dispatch, combine).
DISPATCH = {"index": (gather_slots, scatter_add), "einsum": (gather_by_mask, combine_by_mask)}


@jax.named_scope("experts")
def run_experts(taken: Float[Array, "G E C D"], experts: dict) -> Float[Array, "G E C D"]:
    """Sends slots to the devices of their experts, applies the experts, and returns the results."""
    num_groups, num_experts, capacity, width = taken.shape
    # An expert's slots in all groups are one axis, so that the gradients of its weights need no transposed copy.
    slots = sharding.to_experts(jnp.swapaxes(taken, 0, 1).reshape(num_experts, -1, width))
    hidden = gelu(checkpoint_name(weight_product(slots, experts["wi"]), HIDDEN))
    out = checkpoint_name(sharding.from_experts(weight_product(hidden, experts["wo"])), OUTPUT)
    return jnp.swapaxes(out.reshape(num_experts, num_groups, capacity, width), 0, 1)


@jax.named_scope("router")
def routing_sums(routing: Routing) -> dict[str, Array]:
    """The sums over tokens and slots that ``routing_statistics`` divides."""
    used = (routing.gates > 0).astype(jnp.float32)
    num_groups, group_tokens, num_experts = routing.probs.shape
    count = _times_taken(used.reshape(num_groups, -1), routing.index.reshape(num_groups, -1), group_tokens)
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


def _times_taken(used: Float[Array, "G EC"], index: Int[Array, "G EC"], group_tokens: int) -> Float[Array, "G S"]:
    """The number of used slots of every token; exact, and so the same in both forms."""
    if sharding.platform() == "cpu":
        return jax.vmap(lambda u, i: jnp.zeros(group_tokens).at[i].add(u))(used, index)
    # On accelerators comparing all pairs takes less time than adding by index.
    return jnp.where(index[..., None] == jnp.arange(group_tokens), used[..., None], 0.0).sum(1)


def routing_statistics(sums: dict[str, Array]) -> dict[str, Array]:
    """Statistics of the routing of the batch's real tokens.

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
