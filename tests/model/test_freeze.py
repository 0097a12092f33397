"""Groups that keep their values, and groups with a learning rate of their own."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from model import sizes
from model.config import OptimizerConfig
from model.groups import named
from model.imp import Imp
from model.step import init_state, make_step, state_shapes
from model.structure import InputShape, Structure

AUDIO, TEXT = InputShape("audio", 3, 4, 2), InputShape("text", 5, 0, 1)
SOUNDS = Structure("softmax", 6, (AUDIO,), classifier="sounds", num_classes=3, classes=(0, 1, 2))
PAIRS = Structure("nce", 6, (AUDIO, TEXT))
ADAM = OptimizerConfig(1e-2, warmup_steps=1, num_steps=10, clip_norm=1e9)
RATE = np.float32(0.01)


@pytest.mark.parametrize(
    ("group", "names", "expected"),
    [
        ("encoder", ["encoder"], "encoder"),
        ("encoder_text", ["encoder"], "encoder"),
        ("encoder", ["encoder_text"], None),
        ("embed_audio", ["embed", "embed_audio", "embed_a"], "embed_audio"),
        ("pair_audio_text", ["pair_audio", "pair"], "pair_audio"),
        ("classifier_b", ["class", "encoder"], None),
    ],
)
def test_a_name_means_a_group_or_all_that_begin_so(group, names, expected):
    assert named(group, names) == expected


@pytest.fixture(scope="module")
def imp(tiny) -> Imp:
    return Imp.for_structures(tiny(), [SOUNDS])


@pytest.fixture(scope="module")
def update(imp, jit, batch):
    """The state after one step by an optimizer, and its metrics."""

    def run(**fields):
        optimizer = dataclasses.replace(ADAM, **fields)
        state = init_state(imp.init(0), optimizer.freeze)
        return jax.tree.map(np.asarray, jit(make_step(imp, SOUNDS, optimizer))(state, batch(SOUNDS), RATE))

    return run


@pytest.fixture(scope="module")
def whole(update):
    return update()


def test_frozen_groups_keep_their_values_and_have_no_moments(imp, update, whole):
    """The rest moves as it would without, by its own part of the gradient's norm."""
    new, metrics = update(freeze=("encoder", "embed"))
    before, (expected, of_whole) = imp.init(0), whole
    for group in ("encoder", "embed_audio"):
        assert new[group].keys() == {"params"}
        jax.tree.map(np.testing.assert_array_equal, new[group]["params"], before[group])
    assert not np.array_equal(expected["encoder"]["params"]["norm"]["bias"], before["encoder"]["norm"]["bias"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9),
        new["classifier_sounds"],
        expected["classifier_sounds"],
    )
    # The first update's first moment is a tenth of the gradient.
    leaves = jax.tree.leaves(new["classifier_sounds"]["mu"])
    np.testing.assert_allclose(metrics["grad_norm"], 10 * np.sqrt(sum((m**2).sum() for m in leaves)), rtol=1e-5)
    assert metrics["grad_norm"] < of_whole["grad_norm"]


def test_the_state_of_a_frozen_group_is_its_parameters(imp):
    shapes = state_shapes(imp, ("embed_audio",))
    assert shapes["embed_audio"] == {"params": imp.shapes()["embed_audio"]}
    assert shapes["encoder"].keys() == {"params", "mu", "nu", "count"}


def test_groups_step_at_rates_of_their_own(imp, update, whole):
    new, _ = update(learning_rate_scales=(("classifier", 0.5), ("classifier_sounds", 3.0), ("embed", 0.25)))
    before, (expected, _) = imp.init(0), whole
    for group, scale in (("encoder", 1.0), ("embed_audio", 0.25), ("classifier_sounds", 3.0)):
        found, full = (
            np.concatenate([np.ravel(a - b) for a, b in zip(*map(jax.tree.leaves, trees), strict=True)])
            for trees in ((new[group]["params"], before[group]), (expected[group]["params"], before[group]))
        )
        assert np.abs(full).max() > 1e-3
        np.testing.assert_allclose(found, scale * full, rtol=1e-3, atol=1e-6)


@pytest.fixture(scope="module")
def costly(tiny):
    """FLOPs of a step of a model whose encoder is nearly all of it: as XLA counts them, and as ``sizes`` does."""
    config = tiny(width=128, head_dim=64, mlp_dim=512, common_dim=32, scan=False, remat="none", audio_positions=(64, 8))
    structure = Structure("nce", 8, (InputShape("audio", 64, 4, 2), InputShape("text", 64, 0, 1)))
    imp = Imp.for_structures(config, [structure])

    @functools.cache
    def flops(freeze: tuple[str, ...]) -> tuple[float, int]:
        step = make_step(imp, structure, dataclasses.replace(ADAM, freeze=freeze))
        lowered = jax.jit(step).lower(state_shapes(imp, freeze), structure.batch_shapes(), RATE)
        return lowered.cost_analysis()["flops"], sizes.structure_flops(config, structure, freeze=freeze)

    return flops


@pytest.mark.parametrize(
    ("freeze", "share"),
    [
        (("encoder", "embed"), (0.33, 0.36)),
        (("encoder",), (0.66, 0.85)),
        (("embed",), (0.85, 1.01)),
    ],
)
def test_what_is_frozen_costs_nothing_backward(costly, freeze, share):
    low, high = share
    for part, everything in zip(costly(freeze), costly(()), strict=True):
        assert low < part / everything < high
