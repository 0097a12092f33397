"""Attention and blocks against float64 numpy, the scan against a loop over layers, rematerialisation, padding."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from model.attention import SelfAttention, implementation
from model.config import MoEConfig
from model.encoder import REMAT_POLICIES, Encoder
from model.imp import Imp


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def randomise(module: nnx.Module, seed: int) -> nnx.Module:
    """Norm scales and biases away from one and zero, so that a wrong use of them shows."""
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(lambda p: p + 0.2 * rng.normal(size=p.shape).astype(np.float32), state))


def flat(module: nnx.Module) -> dict[str, np.ndarray]:
    """Dotted path → float64 parameter."""
    leaves = flatten_dict(nnx.to_pure_dict(nnx.state(module)), sep=".")
    return {path: np.asarray(leaf, np.float64) for path, leaf in leaves.items()}


def layer_norm(x, scale, bias=0.0):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale + bias


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attention_by_loops(x, params, *, real, qk_norm, num_heads=2, head_dim=8):
    """One query at a time; ``params`` as from ``flat``."""
    out = np.zeros_like(x)
    for b in range(x.shape[0]):
        query, key, value = np.split(x[b] @ params["qkv.kernel"], 3, axis=-1)
        for h in range(num_heads):
            head = slice(h * head_dim, (h + 1) * head_dim)
            q, k, v = query[:, head], key[:, head], value[:, head]
            if qk_norm:
                q, k = layer_norm(q, params["query_norm.scale"]), layer_norm(k, params["key_norm.scale"])
            for i in range(x.shape[1]):
                weight = np.exp(k[real[b]] @ q[i] / np.sqrt(head_dim))
                out[b, i, head] = weight / weight.sum() @ v[real[b]]
    return out @ params["out.kernel"]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_against_numpy(tiny, jit, qk_norm):
    attention = randomise(SelfAttention(tiny(qk_norm=qk_norm), rngs=nnx.Rngs(0)), seed=1)
    params = flat(attention)
    assert set(params) == {"qkv.kernel", "out.kernel"} | ({"query_norm.scale", "key_norm.scale"} if qk_norm else set())
    x, everything = tokens(2, 5, 16), np.ones((2, 5), bool)
    real = np.array([[True] * 5, [True, False, True, True, False]])
    forward = jit(attention)
    for mask, used in ((None, everything), (real, real)):
        expected = attention_by_loops(x.astype(np.float64), params, real=used, qk_norm=qk_norm)
        np.testing.assert_allclose(forward(x, mask), expected, rtol=1e-4, atol=1e-5)


def test_dense_encoder_against_numpy(tiny, jit):
    encoder = randomise(Encoder(tiny(depth=2), rngs=nnx.Rngs(0)), seed=1)
    params, x = flat(encoder), tokens(2, 5, 16)
    real = np.array([[True] * 5, [True, True, True, False, False]])
    out, statistics = jit(encoder)(x, real)
    assert statistics == {}

    expected = x.astype(np.float64)
    for layer in range(2):
        p = {name.removeprefix("dense."): leaf[layer] for name, leaf in params.items() if name.startswith("dense.")}
        attention = {name.removeprefix("attention."): leaf for name, leaf in p.items()}
        normed = layer_norm(expected, p["attention_norm.scale"])
        expected = expected + attention_by_loops(normed, attention, real=real, qk_norm=False)
        normed = layer_norm(expected, p["mlp_norm.scale"])
        expected = expected + gelu(normed @ p["mlp.wi.kernel"]) @ p["mlp.wo.kernel"]
    expected = layer_norm(expected, params["norm.scale"], params["norm.bias"])
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def mixed(tiny) -> Encoder:
    """Two dense layers, then two of experts."""
    config = tiny(depth=4, moe=MoEConfig(2, 2), qk_norm=True)
    return randomise(Encoder(config, rngs=nnx.Rngs(2)), seed=3)


def by_loop(encoder: Encoder, x, mask, *, order):
    layers = []
    for name in order:
        graph, params = nnx.split(getattr(encoder, name))
        for i in range(2):
            block = nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], params))
            x, statistics = block(x, mask, group_samples=1)
            layers.append(statistics)
    return encoder.norm(x), layers


def test_scan_equals_a_loop_over_layers(mixed, jit):
    x, mask = tokens(2, 6, 16, seed=4), np.array([[True] * 6, [True] * 4 + [False] * 2])

    @jit
    def both(x, mask):
        dense_first = by_loop(mixed, x, mask, order=("dense", "sparse"))
        return mixed(x, mask), dense_first, by_loop(mixed, x, mask, order=("sparse", "dense"))[0]

    (out, statistics), (expected, layers), sparse_first = both(x, mask)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(out - sparse_first)).max() > 0.1
    # Dense layers have no statistics; those of the sparse ones are stacked in order.
    assert layers[:2] == [{}, {}]
    for name in ("unrouted_fraction", "confidence", "expert_load"):
        stacked = np.stack([layer[name] for layer in layers[2:]])
        np.testing.assert_allclose(statistics[name], stacked, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_interleaved_sparse_layers(tiny, jit, remat):
    """Six layers, every third sparse: against a loop, and scanned against unrolled."""
    moe = MoEConfig(2, 2, placement="interleaved")
    config = tiny(depth=6, moe=moe, qk_norm=True, remat=remat)
    assert config.sparse_layers == (2, 5)
    encoder = randomise(Encoder(config, rngs=nnx.Rngs(2)), seed=3)
    x, mask = tokens(2, 6, 16, seed=4), np.array([[True] * 6, [True] * 4 + [False] * 2])
    blocks = {name: nnx.split(getattr(encoder, name)) for name in ("dense", "sparse")}

    @jit
    def by_hand(x, mask):
        taken = {"dense": 0, "sparse": 0}
        for name in ("dense", "dense", "sparse", "dense", "dense", "sparse"):
            graph, params = blocks[name]
            x, _ = nnx.merge(graph, jax.tree.map(lambda p, i=taken[name]: p[i], params))(x, mask, group_samples=1)
            taken[name] += 1
        return encoder.norm(x)

    out, statistics = jit(encoder)(x, mask)
    np.testing.assert_allclose(out, by_hand(x, mask), rtol=1e-4, atol=1e-4)
    assert statistics["expert_load"].shape == (2, 2)
    unrolled = nnx.merge(
        nnx.graphdef(Encoder(dataclasses.replace(config, scan=False), rngs=nnx.Rngs(0))), nnx.state(encoder)
    )
    again, more = jit(unrolled)(x, mask)
    np.testing.assert_allclose(again, out, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(more["expert_load"], statistics["expert_load"], rtol=1e-4)


@pytest.mark.parametrize(("choice", "expected"), [("auto", "xla"), ("xla", "xla"), ("cudnn", "cudnn")])
def test_attention_kernel_on_a_cpu(choice, expected):
    query = jax.ShapeDtypeStruct((2, 256, 2, 64), "bfloat16")
    assert implementation(choice, query) == expected


def test_layers_start_different(tiny):
    for name, leaf in flat(Encoder(tiny(depth=3), rngs=nnx.Rngs(0))).items():
        if name.startswith("dense.") and name.endswith("kernel"):
            assert leaf.shape[0] == 3
            assert not np.array_equal(leaf[0], leaf[1])
            assert not np.array_equal(leaf[1], leaf[2])


def test_an_encoder_may_be_sparse_throughout(tiny):
    config = tiny(depth=2, moe=MoEConfig(2, 2))
    encoder = Encoder(config, rngs=nnx.Rngs(0))
    out, statistics = jax.eval_shape(encoder, tokens(2, 6, 16))
    assert not hasattr(encoder, "dense")
    assert out.shape == (2, 6, 16)
    assert statistics["expert_load"].shape == (2, 2)


@pytest.fixture(scope="module")
def with_policy(tiny):
    """Remat policy → (params, x) → loss of the same encoder."""

    def make(policy: str, dtype: str = "float32"):
        config = dataclasses.replace(tiny(depth=2, moe=MoEConfig(2, 2)), remat=policy, dtype=dtype)
        graph, params = nnx.split(Encoder(config, rngs=nnx.Rngs(5)))
        return (lambda params, x: (nnx.merge(graph, params)(x)[0] ** 3).sum()), params

    return make


@pytest.mark.slow
def test_remat_changes_no_gradient(with_policy, jit):
    x, gradients = tokens(2, 6, 16), {}
    for policy in REMAT_POLICIES:
        loss, params = with_policy(policy)
        gradients[policy] = jax.tree.leaves(jit(jax.grad(loss, argnums=(0, 1)))(params, x))
    assert all(np.abs(g).max() > 1e-4 for g in gradients["none"])
    for policy in ("full", "attention", "dots", "products"):
        for found, expected in zip(gradients[policy], gradients["none"], strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4, err_msg=policy)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_remat_keeps_less(with_policy, dtype):
    def kept(policy: str) -> int:
        """Bytes between the forward and the backward pass."""
        loss, params = with_policy(policy, dtype)
        backward = jax.eval_shape(lambda params, x: jax.vjp(loss, params, x)[1], params, tokens(2, 6, 16))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))

    assert set(REMAT_POLICIES) == {"auto", "none", "full", "attention", "dots", "products"}
    assert kept("full") < kept("attention") < kept("dots") < kept("products") < kept("none")


def test_padding_changes_no_pooled_text(tiny, jit):
    config = tiny(depth=2, moe=MoEConfig(2, 1), qk_norm=True)
    imp = Imp(config, modalities=("text",), pairs=(), classifiers={})
    params, rng = imp.init(0), np.random.default_rng(6)
    encode = jit(lambda tokens, positions, mask: imp.forward(params, "text", tokens, positions, mask, group_samples=1))

    def features(length: int, *, fill: int):
        """Three texts of 7, 4 and 1 tokens in arrays of ``length``; the rest is ``fill``."""
        mask = np.arange(length) < np.array([[7], [4], [1]])
        padded = np.full((3, length), fill, np.int32)
        padded[:, :7] = ids
        positions = np.broadcast_to(np.arange(length, dtype=np.int32)[None, :, None], (3, length, 1))
        return encode(np.where(mask, padded, fill), positions, mask)

    ids = rng.integers(1, 40, size=(3, 7)).astype(np.int32)
    expected, statistics = features(7, fill=0)
    assert np.abs(np.diff(expected, axis=0)).max() > 0.1
    for length, fill in ((7, 9), (12, 0), (12, 9)):
        found, again = features(length, fill=fill)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        for name, value in statistics.items():
            np.testing.assert_allclose(again[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
