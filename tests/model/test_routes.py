"""The expert of each token against the statistics and the routing of the forward pass itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import MoEConfig
from model.imp import Imp
from model.routes import routes


def sample(num_tokens: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    positions = np.stack([np.zeros(num_tokens), np.arange(num_tokens) // 4, np.arange(num_tokens) % 4], 1)
    tokens = rng.integers(0, 256, (num_tokens, 12), np.uint8)
    return jnp.asarray(tokens), jnp.asarray(positions, jnp.int32)


@pytest.mark.parametrize("placement", ["last", "interleaved"])
@pytest.mark.parametrize("router", ["experts_choose", "tokens_choose"])
@pytest.mark.slow
def test_as_many_tokens_are_without_an_expert_as_the_forward_pass_counts(tiny, placement, router):
    moe = MoEConfig(4, 2, placement=placement, router=router)
    imp = Imp(tiny(depth=4, moe=moe), modalities=("vision",))
    params = imp.init(0)
    tokens, positions = sample(12)
    found = np.asarray(routes(imp, params, "vision", tokens, positions))
    assert found.shape == (2, 12) and found.min() >= -1 and found.max() < 4
    _, statistics = imp.forward(params, "vision", tokens[None], positions[None], group_samples=1)
    np.testing.assert_allclose((found < 0).mean(1), statistics["unrouted_fraction"], atol=1e-6)


def test_the_expert_of_a_token_is_the_one_with_the_highest_gate(tiny, monkeypatch):
    """Two experts take token 1, the second with the higher gate; token 2 is taken by the first alone, token 0 not."""
    imp = Imp(tiny(depth=1, moe=MoEConfig(2, 1)), modalities=("vision",))

    gates, index = jnp.array([[[0.3, 0.6], [0.7, 0.0]]]), jnp.array([[[1, 2], [1, 0]]])
    found = _with_routing(monkeypatch, imp, gates, index)
    np.testing.assert_array_equal(found, [[-1, 1, 0]])


def _with_routing(monkeypatch, imp: Imp, gates, index) -> np.ndarray:
    from model import moe

    real = moe.Router.__call__

    def chosen(self, x, token_mask):
        routing = real(self, x, token_mask)
        return moe.Routing(gates=gates, index=index, probs=routing.probs, logits=routing.logits, real=routing.real)

    monkeypatch.setattr(moe.Router, "__call__", chosen)
    tokens, positions = sample(3)
    return np.asarray(routes(imp, imp.init(0), "vision", tokens, positions))


def test_a_dense_model_has_no_routes(tiny):
    imp = Imp(tiny(depth=2), modalities=("vision",))
    tokens, positions = sample(3)
    assert routes(imp, imp.init(0), "vision", tokens, positions).shape == (0, 3)
