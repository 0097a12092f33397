"""Routing, dispatch and combination against numbers worked out by hand and references written as loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import sharding
from model.config import MoEConfig
from model.moe import (
    MoEFeedForward,
    Router,
    Routing,
    auxiliary_loss,
    dispatch_form,
    effective_capacity_factor,
    expert_capacity,
    group_samples,
    routing_statistics,
    routing_sums,
)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "capacity_factor", "expected"),
    [
        (8, 4, 1.0, 2),
        (10, 4, 1.0, 2),  # 2.5 rounds to even
        (14, 4, 1.0, 4),  # 3.5 rounds to even
        (13, 4, 1.0, 3),  # 3.25
        (2, 4, 1.0, 1),  # 0.5 rounds to 0: never fewer than one
        (1, 16, 1.0, 1),
        (10, 4, 2.0, 5),
        (256, 16, 1.0, 16),
        (3, 2, 8.0, 3),  # never more slots than tokens
    ],
)
def test_expert_capacity(num_tokens, num_experts, capacity_factor, expected):
    assert expert_capacity(num_tokens, MoEConfig(num_experts, 1, capacity_factor=capacity_factor)) == expected


def test_effective_capacity_factor():
    assert effective_capacity_factor(256, MoEConfig(16, 1)) == 1.0
    assert effective_capacity_factor(10, MoEConfig(4, 1)) == 0.8  # 2 of 2.5 slots
    assert effective_capacity_factor(8, MoEConfig(16, 1)) == 2.0  # one slot at least
    assert effective_capacity_factor(8, MoEConfig(4, 1, router="tokens_choose", num_selected=2)) == 1.0


@pytest.mark.parametrize(
    ("batch_size", "num_tokens", "expected"),
    [
        (64, 256, 8),
        (256, 16, 128),
        (96, 16, 96),  # the whole batch fits
        (12, 256, 6),  # 8 fit, 6 divides
        (7, 300, 1),  # 6 fit, 7 is prime
        (4, 4096, 1),  # a sample longer than a group
    ],
)
def test_samples_of_a_group(batch_size, num_tokens, expected):
    sizes = {"batch_size": batch_size, "num_tokens": num_tokens}
    assert group_samples(MoEConfig(4, 1, group="tokens", group_size=2048), **sizes) == expected
    assert group_samples(MoEConfig(4, 1, group="sample", group_size=2048), **sizes) == 1


def route_by_loops(x, kernel, *, num_slots, real):
    """Gates and token indices of every group and expert, a list of (gate, token) in the order of preference."""
    taken = []
    for g in range(x.shape[0]):
        probs = softmax(x[g].astype(np.float64) @ kernel.astype(np.float64))
        for e in range(kernel.shape[1]):
            offers = [(probs[s, e], s) for s in range(x.shape[1]) if real[g, s]]
            taken.append(sorted(offers, reverse=True)[: num_slots[g]])
    return taken


@pytest.mark.parametrize("padded", [False, True])
def test_router_takes_the_top_tokens_of_each_expert(tiny, jit, padded):
    config = tiny(moe=MoEConfig(4, 1))
    router = Router(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    kernel, x = rng.normal(size=(16, 4)).astype(np.float32), rng.normal(size=(3, 12, 16)).astype(np.float32)
    router.kernel[...] = jnp.asarray(kernel)
    real = np.ones((3, 12), bool)
    num_slots = [3, 3, 3]
    if padded:
        real[1, 7:] = False  # 7 real tokens
        real[2, [0, 1, 3, 4, 6, 7, 9, 10, 11]] = False  # 3 real tokens, scattered
        num_slots = [3, 2, 1]  # round(12 / 4), round(7 / 4), round(3 / 4)
    routing = jit(router)(x, real if padded else None)
    gates, index, probs = routing.gates, routing.index, routing.probs

    assert gates.shape == index.shape == (3, 4, 3)
    assert gates.dtype == jnp.float32
    expected = route_by_loops(x, kernel, num_slots=num_slots, real=real)
    for found_gates, found_index, pairs in zip(
        np.asarray(gates).reshape(12, 3), np.asarray(index).reshape(12, 3), expected, strict=True
    ):
        used = len(pairs)
        np.testing.assert_allclose(found_gates[:used], [p for p, _ in pairs], rtol=1e-5)
        assert found_index[:used].tolist() == [s for _, s in pairs]
        assert found_gates[used:].tolist() == [0.0] * (3 - used)
    np.testing.assert_allclose(probs, softmax(x.astype(np.float64) @ kernel), rtol=1e-5, atol=1e-7)


def test_router_is_float32_in_a_bfloat16_model(tiny, jit):
    router = Router(tiny(moe=MoEConfig(2, 1), dtype="bfloat16"), rngs=nnx.Rngs(0))
    kernel = np.zeros((16, 2), np.float32)
    kernel[0] = [1.0, 1.0 + 2**-12]
    router.kernel[...] = jnp.asarray(kernel)
    routing = jit(router)(np.ones((1, 2, 16), jnp.bfloat16), None)
    assert routing.probs[0, 0, 1] > routing.probs[0, 0, 0]  # bfloat16 holds 8 bits: the kernel's columns would be equal


# Three tokens over three experts. With the identity as router kernel and tokens 1 + ln(weights), a token's
# probabilities are its weights over their sum.
WEIGHTS = np.array([[6.0, 3.0, 1.0], [5.0, 2.0, 3.0], [1.0, 1.0, 8.0]])
TOKENS = 1 + np.log(WEIGHTS)
FACTORS = np.array([1.0, 10.0, 100.0])


def jitted(jit, layer: MoEFeedForward):
    """(x, mask, group_samples) → output and statistics; compiled once for the shapes of x."""
    return jit(lambda x, mask, group_samples=1: layer(x, mask, group_samples=group_samples), static_argnums=2)


@pytest.fixture(scope="module")
def by_hand(tiny, jit):
    """Expert e multiplies by FACTORS[e]: gelu(100 x) = 100 x for the tokens used here, then FACTORS[e] / 100."""
    config = tiny(width=3, num_heads=1, head_dim=3, mlp_dim=3, moe=MoEConfig(3, 1))
    layer = MoEFeedForward(config, rngs=nnx.Rngs(0))
    identity = np.eye(3, dtype=np.float32)
    layer.router.kernel[...] = jnp.asarray(identity)
    layer.experts.wi[...] = jnp.asarray(np.stack([100.0 * identity] * 3))
    layer.experts.wo[...] = jnp.asarray(np.stack([np.float32(f / 100) * identity for f in FACTORS]))
    return jitted(jit, layer)


def test_combination_by_hand(by_hand):
    out, statistics = by_hand(TOKENS[None].astype(np.float32), None)
    # One slot an expert. Experts 0 and 1 both take token 0 (.6 and .3), expert 2 token 2 (.8), none token 1.
    np.testing.assert_allclose(out[0, 0], (0.6 * 1 + 0.3 * 10) * TOKENS[0], rtol=1e-5)
    assert out[0, 1].tolist() == [0.0, 0.0, 0.0]
    np.testing.assert_allclose(out[0, 2], 0.8 * 100 * TOKENS[2], rtol=1e-5)
    np.testing.assert_allclose(statistics["unrouted_fraction"], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(statistics["confidence"], (0.6 + 0.3 + 0.8) / 3, rtol=1e-6)
    np.testing.assert_allclose(statistics["expert_load"], [0.4, 0.2, 0.4], rtol=1e-6)


def test_combination_by_hand_with_padding(by_hand):
    real = np.array([[False, True, True]])
    out, statistics = by_hand(TOKENS[None].astype(np.float32), real)
    # round(2 / 3) = 1 slot. Among tokens 1 and 2: experts 0 and 1 take token 1 (.5 and .2), expert 2 takes token 2.
    assert out[0, 0].tolist() == [0.0, 0.0, 0.0]
    np.testing.assert_allclose(out[0, 1], (0.5 * 1 + 0.2 * 10) * TOKENS[1], rtol=1e-5)
    np.testing.assert_allclose(out[0, 2], 0.8 * 100 * TOKENS[2], rtol=1e-5)
    assert statistics["unrouted_fraction"] == 0.0
    np.testing.assert_allclose(statistics["confidence"], (0.5 + 0.2 + 0.8) / 3, rtol=1e-6)
    np.testing.assert_allclose(
        statistics["expert_load"], [(0.5 + 0.1) / 2, (0.2 + 0.1) / 2, (0.3 + 0.8) / 2], rtol=1e-6
    )


def test_statistics_by_hand(jit):
    """Two groups of three tokens, two experts, two slots; the last token of the second group is padding."""
    gates = jnp.asarray([[[0.75, 0.5], [0.5, 0.25]], [[0.9, 0.0], [0.6, 0.0]]])
    index = jnp.asarray([[[0, 1], [1, 0]], [[0, 1], [0, 2]]])
    probs = jnp.asarray([[[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]], [[0.9, 0.1], [0.4, 0.6], [0.0, 1.0]]])
    # Both logits ln(k): their logsumexp is ln(2 k).
    logits = jnp.log(jnp.asarray([[1.0, 2, 1], [1, 4, 100]]))[..., None] * jnp.ones(2)
    real = jnp.asarray([[1.0, 1, 1], [1, 1, 0]])
    routing = Routing(gates=gates, index=index, probs=probs, logits=logits, real=real)
    found = jit(lambda routing: routing_statistics(routing_sums(routing)))(routing)
    # Tokens 2 of the first group and 1 of the second are taken by none: a slot with gate zero is not used.
    np.testing.assert_allclose(found["unrouted_fraction"], 2 / 5, rtol=1e-6)
    np.testing.assert_allclose(found["slots_per_token"], 6 / 5, rtol=1e-6)
    np.testing.assert_allclose(found["confidence"], (0.75 + 0.5 + 0.5 + 0.25 + 0.9 + 0.6) / 6, rtol=1e-6)
    np.testing.assert_allclose(found["expert_slots"], [3 / 6, 3 / 6], rtol=1e-6)
    np.testing.assert_allclose(found["expert_load"], [2.8 / 5, 2.2 / 5], rtol=1e-6)
    logarithms = np.log([2, 4, 2, 2, 8])
    np.testing.assert_allclose(found["z_loss"], (logarithms**2).mean(), rtol=1e-6)
    # Liked best: expert 0 by two tokens and the tie of the second, expert 1 by two.
    np.testing.assert_allclose(found["load_balance"], 2 * (3 / 5 * 2.8 / 5 + 2 / 5 * 2.2 / 5), rtol=1e-6)


def test_auxiliary_loss_by_hand():
    statistics = {"z_loss": jnp.asarray([1.0, 3.0]), "load_balance": jnp.asarray([1.0, 1.5])}
    assert auxiliary_loss(statistics, MoEConfig(2, 2)) == 0.0
    weighted = MoEConfig(2, 2, z_loss_weight=0.5, load_balance_weight=0.01)
    np.testing.assert_allclose(auxiliary_loss(statistics, weighted), 0.5 * 4 + 0.01 * 2.5, rtol=1e-6)


# Five tokens over two experts: what each token gives expert 0; expert 1 gets the rest.
FIRST = [0.9, 0.6, 0.8, 0.3, 0.7]


@pytest.mark.parametrize(
    ("settings", "real", "expected"),
    [
        # Capacity round(5 / 2) = 2. In order: tokens 0 and 1 fill expert 0, 2 and 4 are turned away; 3 takes expert 1.
        ({}, None, {0: [(0, 0.9), (1, 0.6)], 1: [(3, 0.7)]}),
        # By their best probability: 0 (.9), 2 (.8), then 3 (.7, expert 1); 4 and 1 are turned away.
        ({"batch_priority": True}, None, {0: [(0, 0.9), (2, 0.8)], 1: [(3, 0.7)]}),
        # Capacity round(10 / 2) = 5: everybody gets both; second choices come after all first ones.
        (
            {"num_selected": 2},
            None,
            {
                0: [(0, 0.9), (1, 0.6), (2, 0.8), (4, 0.7), (3, 0.3)],
                1: [(3, 0.7), (0, 0.1), (1, 0.4), (2, 0.2), (4, 0.3)],
            },
        ),
        # Half of that, round(2.5) = 2: second choices find expert 1 with one place.
        ({"num_selected": 2, "capacity_factor": 0.5}, None, {0: [(0, 0.9), (1, 0.6)], 1: [(3, 0.7), (0, 0.1)]}),
        # Three real tokens: round(3 / 2) = 2 slots; padding asks for nothing.
        ({}, [False, True, True, False, True], {0: [(1, 0.6), (2, 0.8)], 1: []}),
        ({"batch_priority": True}, [False, True, True, False, True], {0: [(2, 0.8), (4, 0.7)], 1: []}),
    ],
)
def test_tokens_choose_by_hand(tiny, jit, settings, real, expected):
    config = tiny(width=2, num_heads=1, head_dim=2, moe=MoEConfig(2, 1, router="tokens_choose", **settings))
    router = Router(config, rngs=nnx.Rngs(0))
    router.kernel[...] = jnp.eye(2)
    first = np.array(FIRST)
    x = np.log(np.stack([first, 1 - first], axis=-1))[None].astype(np.float32)
    routing = jit(router)(x, None if real is None else np.array([real]))
    for expert, pairs in expected.items():
        gates, index = np.asarray(routing.gates)[0, expert], np.asarray(routing.index)[0, expert]
        assert index[: len(pairs)].tolist() == [token for token, _ in pairs]
        np.testing.assert_allclose(gates[: len(pairs)], [gate for _, gate in pairs], rtol=1e-5)
        assert not gates[len(pairs) :].any()


def test_balanced_routing_has_a_load_balance_of_one(tiny, jit):
    layer = MoEFeedForward(tiny(moe=MoEConfig(4, 1, router="tokens_choose")), rngs=nnx.Rngs(0))
    layer.router.kernel[...] = jnp.asarray(np.eye(16, 4, dtype=np.float32))
    x = np.zeros((1, 8, 16), np.float32)
    x[0, np.arange(8), np.arange(8) % 4] = 30.0  # two tokens for each expert, with probability one
    statistics = jitted(jit, layer)(x, None)[1]
    np.testing.assert_allclose(statistics["load_balance"], 1.0, rtol=1e-5)
    np.testing.assert_allclose(statistics["expert_slots"], [0.25] * 4, rtol=1e-5)
    np.testing.assert_allclose(statistics["slots_per_token"], 1.0)
    x[0, :, :4] = [30.0, 0, 0, 0]
    np.testing.assert_allclose(jitted(jit, layer)(x, None)[1]["load_balance"], 4.0, rtol=1e-5)


def test_padding_competes_where_it_is_asked_to(tiny, jit):
    x, real = tokens(2, 6, 16), np.array([[True] * 6, [True, True, False, False, False, False]])
    gates = {}
    for route_padding in (False, True):
        router = Router(tiny(moe=MoEConfig(2, 1, route_padding=route_padding)), rngs=nnx.Rngs(0))
        gates[route_padding] = (np.asarray(jit(router)(x, real).gates) > 0).sum(-1)
    assert gates[False].tolist() == [[3, 3], [1, 1]]
    assert gates[True].tolist() == [[3, 3], [3, 3]]


@pytest.fixture(scope="module")
def layer(tiny):
    layer = MoEFeedForward(tiny(moe=MoEConfig(2, 1)), rngs=nnx.Rngs(3))
    layer.router.kernel[...] = jnp.asarray(tokens(16, 2, seed=4))
    return layer


@pytest.fixture(scope="module")
def forward(layer, jit):
    return jitted(jit, layer)


def tokens(*shape: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_layer_against_numpy(layer, forward):
    x = tokens(4, 7, 16)
    kernel, wi, wo = (np.asarray(p[...], np.float64) for p in (layer.router.kernel, layer.experts.wi, layer.experts.wo))
    expected = np.zeros((4, 7, 16))
    taken = route_by_loops(x, kernel, num_slots=[4] * 4, real=np.ones((4, 7), bool))  # round(3.5) = 4
    for (sample, expert), pairs in zip(np.ndindex(4, 2), taken, strict=True):
        for gate, token in pairs:
            expected[sample, token] += gate * gelu(x[sample, token] @ wi[expert]) @ wo[expert]
    out, _ = forward(x, None)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", ["experts_choose", "tokens_choose"])
@pytest.mark.parametrize("padded", [False, True])
def test_dispatch_by_index_and_by_einsum_are_equal(tiny, jit, router, padded):
    """Values and gradients, by the router's kernel, the experts' weights and the tokens."""
    moe = MoEConfig(2, 1, router=router, num_selected=2 if router == "tokens_choose" else 1)
    real = jnp.asarray(np.arange(7) < np.array([[7], [5], [3], [1]])) if padded else None

    def run(dispatch):
        layer = MoEFeedForward(tiny(moe=dataclasses.replace(moe, dispatch=dispatch)), rngs=nnx.Rngs(3))
        layer.router.kernel[...] = jnp.asarray(tokens(16, 2, seed=4))
        graph, params = nnx.split(layer)

        def loss(params, x):
            out = nnx.merge(graph, params)(x, real, group_samples=2)[0]
            return jnp.sin(out).sum(), out

        return jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, tokens(4, 7, 16))

    (_, out), gradients = run("index")
    (_, expected), expected_gradients = run("einsum")
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        assert np.abs(b).max() > 1e-3
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_dispatch_form():
    assert dispatch_form(MoEConfig(2, 1), 256) == "index"  # on a CPU
    assert dispatch_form(MoEConfig(2, 1, dispatch="einsum"), 4096) == "einsum"


@pytest.mark.parametrize(
    ("platform", "group", "form"), [("gpu", 256, "einsum"), ("gpu", 2048, "index"), ("tpu", 2048, "einsum")]
)
def test_dispatch_form_on_accelerators(monkeypatch, platform, group, form):
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    assert dispatch_form(MoEConfig(2, 1), group) == form


def test_padding_changes_no_real_token(forward):
    x = tokens(4, 7, 16)
    real = np.arange(7) < np.array([[7], [5], [3], [1]])
    short, short_statistics = forward(x, real)
    padded = np.concatenate([x, 100 * tokens(4, 6, 16, seed=6)], axis=1)
    more = np.concatenate([real, np.zeros((4, 6), bool)], axis=1)
    long, long_statistics = forward(padded, more)
    np.testing.assert_allclose(long[:, :7], short, rtol=1e-5, atol=1e-6)
    assert not np.asarray(long)[~more].any()
    assert not np.asarray(short)[~real].any()
    for name, value in short_statistics.items():
        np.testing.assert_allclose(long_statistics[name], value, rtol=1e-5, err_msg=name)


def test_mask_without_padding_equals_no_mask(forward):
    x = tokens(4, 7, 16)
    masked, plain = (forward(x, mask)[0] for mask in (np.ones((4, 7), bool), None))
    np.testing.assert_allclose(masked, plain, rtol=1e-6, atol=1e-7)


def test_slots_follow_the_real_tokens(layer, jit):
    num_real = np.array([12, 5, 3, 1, 0])
    real = np.arange(12) < num_real[:, None]
    routing = jit(layer.router)(tokens(5, 12, 16), real)
    gates, index = routing.gates, routing.index
    # round(n / 2): 6, round(2.5) = 2, round(1.5) = 2, at least one slot, and nothing to take in an empty sample.
    assert (np.asarray(gates) > 0).sum(-1).tolist() == [[6, 6], [2, 2], [2, 2], [1, 1], [0, 0]]
    assert (np.asarray(index)[1, :, :2] < 5).all()


@pytest.mark.parametrize(
    ("num_tokens", "capacity_factor", "expected"),
    # round(22.5); then c n / E = 31.5, which float32 and float64 meet from different sides.
    [(45, 1.0, {22}), (45, 1.4, {31, 32}), (60, 1.05, {31, 32})],
)
def test_slots_are_the_same_however_much_padding(tiny, jit, num_tokens, capacity_factor, expected):
    router = Router(tiny(moe=MoEConfig(2, 1, capacity_factor=capacity_factor)), rngs=nnx.Rngs(0))
    x, found = tokens(1, num_tokens + 10, 16), []
    for mask_length in (0, num_tokens, num_tokens + 10):
        mask = np.arange(mask_length)[None] < num_tokens if mask_length else None
        gates = jit(router)(x[:, : mask_length or num_tokens], mask).gates
        found += (np.asarray(gates) > 0).sum(-1).ravel().tolist()  # of both experts
    assert len(set(found)) == 1, found
    assert found[0] in expected


def test_a_result_does_not_depend_on_the_rest_of_the_batch(forward):
    x = tokens(4, 7, 16)
    out = np.asarray(forward(x, None)[0])
    order = [2, 0, 3, 1]
    permuted, _ = forward(x[order], None)
    np.testing.assert_allclose(permuted, out[order], rtol=1e-6, atol=1e-7)
    others = tokens(4, 7, 16, seed=8)
    others[1] = x[1]
    among_others, _ = forward(others, None)
    np.testing.assert_allclose(among_others[1], out[1], rtol=1e-6, atol=1e-7)


def test_samples_of_a_group_compete(by_hand):
    """Tokens 0 and 2 in one sample, token 1 twice in the next; one group of four tokens, one slot an expert."""
    x = TOKENS[[[0, 2], [1, 1]]].astype(np.float32)
    out, _ = by_hand(x, None, 2)
    np.testing.assert_allclose(out[0, 0], (0.6 * 1 + 0.3 * 10) * TOKENS[0], rtol=1e-5)
    np.testing.assert_allclose(out[0, 1], 0.8 * 100 * TOKENS[2], rtol=1e-5)
    assert not np.asarray(out[1]).any()
    separate, _ = by_hand(x, None, 1)
    assert np.asarray(separate[1]).any()


def test_experts_start_different(layer):
    wi = np.asarray(layer.experts.wi[...])
    assert wi.shape == (2, 16, 32)
    assert not np.array_equal(wi[0], wi[1])


def test_a_batch_that_groups_do_not_divide_raises(layer):
    with pytest.raises(ValueError, match=r"batch of 5 samples .* groups of 2 samples"):
        layer(jnp.zeros((5, 3, 16)), None, group_samples=2)
