"""The GPU forms of operations, run on a CPU: the same losses, gradients and statistics."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import attention, moe, sharding, step
from model.config import MoEConfig
from model.encoder import REMAT_POLICIES
from model.imp import Imp
from model.structure import Structure


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Has the model take a GPU's choices, but for what a CPU cannot compute."""

    def start() -> None:
        monkeypatch.setattr(sharding, "platform", lambda: "gpu")
        monkeypatch.setattr(moe, "_PRECISION", {})

    return start


@pytest.mark.slow
def test_a_gpus_choices_change_no_value(as_on_a_gpu, tiny, inputs, batch, jit):
    config = tiny(depth=2, moe=MoEConfig(2, 1), qk_norm=True, remat="products")
    structure = Structure(
        (("nce", 1.0), ("softmax", 1.0)),
        4,
        (inputs("vision", 6), inputs("text", 5)),
        classifier="set",
        num_classes=3,
        classes=(0, 1, 2),
    )
    imp, arrays = Imp.for_structures(config, [structure]), batch(structure)
    params = imp.init(0)

    def loss():
        with_gradients = jax.value_and_grad(lambda *given: imp.loss(*given, structure), has_aux=True)
        return jit(with_gradients)(params, arrays)

    expected = loss()
    as_on_a_gpu()
    found = loss()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_lengths_in_place_of_a_mask(monkeypatch):
    """The fused kernel's call, computed by plain operations; the kernel itself is seen by benchmarks/gpu.py alone."""
    plain = jax.nn.dot_product_attention
    query, key, value = jax.random.normal(jax.random.key(0), (3, 4, 6, 2, 8))
    mask = jnp.arange(6) < jnp.array([[6], [4], [1], [3]])
    expected = attention.attend(query, key, value, mask, implementation="xla")
    asked = []

    def fused(*arrays, implementation, **named):
        asked.append(implementation)
        return plain(*arrays, implementation="xla", **named)

    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    found = attention.attend(query, key, value, mask, implementation="cudnn")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert asked == ["cudnn"]
    nothing = attention.attend(query, key, value, jnp.zeros_like(mask), implementation="cudnn")
    assert np.isfinite(nothing).all()


def test_the_fused_kernels_results_are_kept():
    def keeps(policy: str, name: str) -> bool:
        return REMAT_POLICIES[policy](types.SimpleNamespace(name=name))

    assert keeps("products", "dot_product_attention_fwd_wrapper")
    assert not keeps("full", "dot_product_attention_fwd_wrapper")
    assert not keeps("products", "add")


def test_remat_follows_the_memory(tiny, inputs):
    structure = Structure("nce", 64, (inputs("vision", 12), inputs("text", 8)))
    imp = Imp.for_structures(tiny(depth=4), [structure])

    def refuse() -> dict:
        raise RuntimeError("MemoryStats is only supported for addressable devices")

    def settled(gib: float | None, *, platform: str = "gpu", deterministic: bool = False) -> tuple[str, str]:
        own = types.SimpleNamespace(
            platform=platform, process_index=0, memory_stats=lambda: gib and {"bytes_limit": int(gib * 2**30)}
        )
        # As jax does: another process's device cannot be asked.
        other = types.SimpleNamespace(platform=platform, process_index=1, memory_stats=refuse)
        found = step._settled(imp, structure, [other, own], fsdp=False, deterministic=deterministic, freeze=()).config
        return found.remat, found.attention

    chosen = [settled(gib)[0] for gib in (1.0, 0.0055, 0.004, 1e-4)]
    assert chosen[0] == "none"
    assert chosen[-1] == "full"
    order = ["none", "products", "attention", "full"]
    assert chosen == sorted(chosen, key=order.index)
    assert len(set(chosen)) > 2
    assert settled(1.0, platform="cpu") == ("auto", "auto")
    # Some of jax's allocators keep no statistics.
    assert settled(None, deterministic=True) == ("auto", "xla")
    assert settled(1.0, deterministic=True) == ("none", "xla")
