"""Structures, parameter groups and their independence, and the loss of a structure against float64 numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import MoEConfig
from model.groups import pair_group
from model.imp import Imp
from model.structure import InputShape, Structure

VISION = InputShape("vision", num_tokens=4, num_values=12, num_axes=3)
AUDIO = InputShape("audio", num_tokens=3, num_values=4, num_axes=2)
TEXT = InputShape("text", num_tokens=5, num_values=0, num_axes=1)
TRIPLET = Structure("nce", 4, (VISION, AUDIO, TEXT))
CAPTIONS = Structure("nce", 4, (VISION, TEXT))
DIGITS = Structure("softmax", 4, (VISION,), classifier="digits", num_classes=5, classes=(0, 2, 3))
SOUNDS = Structure("sigmoid", 4, (AUDIO,), classifier="sounds", num_classes=3, classes=(0, 1, 2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objectives": "ncs"}, "unknown objective 'ncs'; known: nce, sigmoid_pairs, softmax, sigmoid"),
        ({"inputs": (VISION,)}, r"nce needs two modalities or more, found \['vision'\]"),
        ({"objectives": (("nce", 1.0), ("nce", 2.0))}, "expected different objectives with weights above 0"),
        ({"objectives": (("nce", 1.0), ("softmax", 0.0))}, "expected different objectives with weights above 0"),
        ({"objectives": (("nce", 1.0), ("softmax", 1.0))}, "softmax needs one modality and a classifier"),
        ({"microbatches": 2}, "nce compares the whole batch: expected 1 microbatch, found 2"),
        ({"microbatches": 3}, "a batch of 4 samples cannot be cut into 3 microbatches"),
        ({"pair_weights": (("audio_text", 1.0),)}, r"expected weights of \['text_vision'\], not all 0"),
        ({"pair_weights": (("text_vision", 0.0),)}, r"expected weights of \['text_vision'\], not all 0"),
        ({"objectives": "softmax", "classifier": "digits"}, "softmax needs one modality and a classifier"),
        ({"objectives": "sigmoid", "inputs": (AUDIO,)}, "sigmoid needs one modality and a classifier"),
        (
            {"objectives": "softmax", "inputs": (), "classifier": "digits"},
            "softmax needs one modality and a classifier",
        ),
    ],
)
def test_structures_that_make_no_sense_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        Structure(**({"objectives": "nce", "global_batch_size": 4, "inputs": (VISION, TEXT)} | fields))


def test_unknown_modalities_raise(tiny):
    structure = Structure("nce", 4, (VISION, dataclasses.replace(AUDIO, modality="smell")))
    with pytest.raises(ValueError, match=r"unknown modalities \['smell'\]; known: vision, audio, text"):
        Imp.for_structures(tiny(), [structure])


def test_groups_of_structures(tiny):
    assert CAPTIONS.groups(tiny()) == ("encoder", "embed_vision", "embed_text", "pair_text_vision")
    assert DIGITS.groups(tiny()) == ("encoder", "embed_vision", "classifier_digits")
    assert TRIPLET.pairs == (("audio", "text"), ("audio", "vision"), ("text", "vision"))
    assert set(TRIPLET.groups(tiny())) == {
        "encoder",
        *("embed_vision", "embed_audio", "embed_text"),
        *("pair_audio_text", "pair_audio_vision", "pair_text_vision"),
    }
    assert DIGITS.pairs == ()
    assert pair_group("vision", "text") == pair_group("text", "vision") == "pair_text_vision"


def test_equal_structures_are_one_key():
    assert len({CAPTIONS, Structure("nce", 4, (VISION, TEXT)), Structure("nce", 8, (VISION, TEXT))}) == 2


def test_batch_shapes():
    found = jax.tree.map(lambda s: (s.shape, s.dtype.name), TRIPLET.batch_shapes())
    assert found == {
        "vision": {"tokens": ((4, 4, 12), "uint8"), "positions": ((4, 4, 3), "int32")},
        "audio": {"tokens": ((4, 3, 4), "float32"), "positions": ((4, 3, 2), "int32")},
        "text": {"tokens": ((4, 5), "int32"), "positions": ((4, 5, 1), "int32"), "mask": ((4, 5), "bool")},
        "positive_ids": ((4, 2), "int32"),
    }
    found = jax.tree.map(lambda s: (s.shape, s.dtype.name), DIGITS.batch_shapes())
    assert found == {
        "vision": {"tokens": ((4, 4, 12), "uint8"), "positions": ((4, 4, 3), "int32")},
        "labels": ((4, 5), "uint8"),
    }


def test_groups_of_a_run_have_a_fixed_order(tiny):
    expected = (
        "encoder",
        *("embed_audio", "embed_text", "embed_vision"),
        "pair_text_vision",
        *("classifier_digits", "classifier_sounds"),
    )
    assert Imp.for_structures(tiny(), [SOUNDS, CAPTIONS, DIGITS]).groups == expected
    assert Imp.for_structures(tiny(), [DIGITS, CAPTIONS, SOUNDS, CAPTIONS]).groups == expected


def test_another_task_changes_no_initial_value(tiny):
    alone = Imp.for_structures(tiny(), [CAPTIONS]).init(3)
    more = Imp.for_structures(tiny(), [DIGITS, TRIPLET, CAPTIONS, SOUNDS]).init(3)
    assert set(alone) < set(more)
    for group, params in alone.items():
        for found, expected in zip(jax.tree.leaves(more[group]), jax.tree.leaves(params), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_initial_values(tiny):
    imp = Imp.for_structures(tiny(depth=2, moe=MoEConfig(2, 1), temperature_init=0.7), [TRIPLET, DIGITS])
    params = imp.init(0)
    assert jax.tree.map(lambda p: (p.shape, p.dtype), params) == jax.tree.map(
        lambda p: (p.shape, p.dtype), imp.shapes()
    )
    assert {p.dtype for p in jax.tree.leaves(params)} == {np.dtype("float32")}
    encoder, text, pair = params["encoder"], params["embed_text"], params["pair_audio_text"]
    for leaf, std in [
        (encoder["dense"]["attention"]["qkv"]["kernel"], 16**-0.5),
        (encoder["dense"]["mlp"]["wo"]["kernel"], 32**-0.5),
        (encoder["sparse"]["mlp"]["experts"]["wi"], 16**-0.5),
        (encoder["sparse"]["mlp"]["experts"]["wo"], 32**-0.5),
        (text["table"], 1.0),
        (text["position"]["tables"]["axis_0"], 0.02),
        (params["embed_vision"]["patch"]["linear"]["kernel"], 48**-0.5),
        (pair["heads"]["text"]["wi"]["kernel"], 16**-0.5),
    ]:
        np.testing.assert_allclose(np.std(leaf), std, rtol=0.15)
    np.testing.assert_allclose(np.std(encoder["sparse"]["mlp"]["router"]["kernel"]), 0.02, rtol=0.4)  # 32 values
    assert pair["tau"] == np.float32(0.7)
    heads = [
        params[g]["heads"][m]["wi"]["kernel"] for g, m in (("pair_audio_text", "text"), ("pair_text_vision", "text"))
    ]
    assert not np.array_equal(*heads)
    assert not np.array_equal(
        encoder["dense"]["mlp"]["wi"]["kernel"], imp.init(1)["encoder"]["dense"]["mlp"]["wi"]["kernel"]
    )


def test_unknown_group_names_the_known(tiny):
    imp = Imp.for_structures(tiny(), [DIGITS])
    with pytest.raises(ValueError, match="'pair_text_vision'; known: encoder, embed_vision, classifier_digits"):
        imp.module({}, "pair_text_vision")


@pytest.mark.parametrize(("tau", "expected"), [(0.3, 0.3), (0.001, 0.01), (-2.0, 0.01)])
def test_temperature_has_a_floor(tiny, tau, expected):
    imp = Imp.for_structures(tiny(), [CAPTIONS])
    pair = imp.module(
        {"pair_text_vision": {**imp.init(0)["pair_text_vision"], "tau": jnp.float32(tau)}}, "pair_text_vision"
    )
    np.testing.assert_allclose(pair.temperature, expected, rtol=1e-6)


@pytest.fixture(scope="module")
def run(tiny, jit, batch):
    """A model, its parameters (no bias at zero), a batch, its pooled features as float64, its loss and metrics."""
    imp = Imp.for_structures(tiny(), [TRIPLET, DIGITS])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: np.asarray(p) + 0.1 * rng.normal(size=p.shape).astype(np.float32), imp.init(0))
    for tau, pair in zip((0.1, 0.3, 0.5), TRIPLET.pairs, strict=True):
        params[pair_group(*pair)]["tau"] = np.float32(tau)

    @jit
    def features_and_loss(params, batch):
        features = {m: imp.encode(params, m, **batch[m]) for m in ("vision", "audio", "text")}
        return features, imp.loss(params, batch, TRIPLET)

    arrays = batch(TRIPLET)
    features, loss = features_and_loss(params, arrays)
    return imp, params, arrays, jax.tree.map(lambda f: np.asarray(f, np.float64), features), loss


def head(params, x):
    hidden = x @ params["wi"]["kernel"] + params["wi"]["bias"]
    hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    out = hidden @ params["wo"]["kernel"] + params["wo"]["bias"]
    out = (out - out.mean(-1, keepdims=True)) / np.sqrt(out.var(-1, keepdims=True) + 1e-6)
    return out * params["norm"]["scale"] + params["norm"]["bias"]


def test_triplet_is_the_mean_of_three_pairs(run):
    _, params, _, features, (loss, metrics) = run
    expected = []
    for (a, b), tau in zip(TRIPLET.pairs, (0.1, 0.3, 0.5), strict=True):
        heads = params[f"pair_{a}_{b}"]["heads"]
        first, second = head(heads[a], features[a]), head(heads[b], features[b])
        cosine = first @ second.T / np.linalg.norm(first, axis=1)[:, None] / np.linalg.norm(second, axis=1)
        weight = np.exp(cosine / tau)
        own = np.diag(weight)
        expected.append(-0.5 * (np.log(own / weight.sum(1)) + np.log(own / weight.sum(0))).mean())
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-4)
    assert metrics["moe"] == {}
    temperatures = {name: float(value) for name, value in metrics["temperatures"].items()}
    assert temperatures == pytest.approx({"audio_text": 0.1, "audio_vision": 0.3, "text_vision": 0.5})


def test_pair_weights(run, jit):
    """Weights 3 and 1, the third pair left out with its heads."""
    imp, params, batch, _, (_, metrics) = run
    weights = (("audio_text", 3.0), ("audio_vision", 0.0))
    structure = dataclasses.replace(TRIPLET, pair_weights=weights)
    assert structure.pairs == (("audio", "text"), ("text", "vision"))
    assert "pair_audio_vision" not in structure.groups(imp.config)
    loss, found = jit(lambda params, batch: imp.loss(params, batch, structure))(params, batch)
    of_pairs = metrics["losses"]
    assert set(of_pairs) == {"nce_audio_text", "nce_audio_vision", "nce_text_vision"}
    expected = (3 * of_pairs["nce_audio_text"] + of_pairs["nce_text_vision"]) / 4
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert set(found["losses"]) == {"nce_audio_text", "nce_text_vision"}


def test_a_weighted_sum_over_one_batch(run, jit):
    """The classifier looks at vision, not at text; the parts are those of the two tasks alone."""
    imp, params, arrays, _, _ = run
    structure = Structure(
        (("nce", 2.0), ("softmax", 0.5)), 4, (TEXT, VISION), classifier="digits", num_classes=5, classes=(0, 2, 3)
    )
    assert structure.classified == "vision"
    assert structure.groups(imp.config) == (
        *("encoder", "embed_text", "embed_vision"),
        *("pair_text_vision", "classifier_digits"),
    )
    labels = np.eye(5, dtype=np.uint8)[[0, 2, 3, 0]]
    both = {name: arrays[name] for name in ("vision", "text", "positive_ids")} | {"labels": labels}
    assert jax.tree.structure(structure.batch_shapes()) == jax.tree.structure(both)

    @jit
    def losses(params, batch):
        return [imp.loss(params, batch, s)[0] for s in (CAPTIONS, DIGITS)], imp.loss(params, batch, structure)

    (nce, softmax), (loss, metrics) = losses(params, both)
    np.testing.assert_allclose(loss, 2 * nce + 0.5 * softmax, rtol=1e-5)
    parts = {name: float(value) for name, value in metrics["losses"].items()}
    assert parts == pytest.approx({"nce": float(nce), "softmax": float(softmax)}, rel=1e-5)


def test_router_losses_are_added(tiny, jit, batch):
    moe = MoEConfig(2, 2)
    weighted = dataclasses.replace(moe, z_loss_weight=0.5, load_balance_weight=2.0)

    def run(moe):
        imp = Imp.for_structures(tiny(depth=2, moe=moe), [CAPTIONS])
        return jit(lambda params, batch: imp.loss(params, batch, CAPTIONS))(imp.init(0), batch(CAPTIONS))

    (plain, metrics), (loss, with_losses) = run(moe), run(weighted)
    assert "router" not in metrics["losses"]
    # Two layers, two modalities.
    sums = {n: sum(metrics["moe"][m][n].sum() for m in ("vision", "text")) for n in ("z_loss", "load_balance")}
    expected = 0.5 * sums["z_loss"] + 2.0 * sums["load_balance"]
    np.testing.assert_allclose(with_losses["losses"]["router"], expected, rtol=1e-5)
    np.testing.assert_allclose(loss, plain + expected, rtol=1e-5)


def test_towers_are_encoders_of_their_own(tiny, jit, batch):
    """Each modality goes through its own parameters alone; the release's comparison in its Figure 6."""
    config = tiny(towers="per_modality")
    imp = Imp.for_structures(config, [CAPTIONS])
    assert imp.groups[:2] == ("encoder_text", "encoder_vision")
    assert CAPTIONS.groups(config)[:2] == ("encoder_vision", "encoder_text")
    params, arrays = imp.init(0), batch(CAPTIONS)
    encode = jit(lambda params, batch: [imp.encode(params, m, **batch[m]) for m in ("vision", "text")])
    vision, text = encode(params, arrays)
    moved = params | {"encoder_text": jax.tree.map(lambda p: p + 0.1, params["encoder_text"])}
    vision_again, text_again = encode(moved, arrays)
    np.testing.assert_array_equal(vision_again, vision)
    assert np.abs(text_again - text).max() > 1e-2


def test_offsets_are_a_group_of_the_sigmoid_pair_loss(tiny, jit, batch):
    pairwise = dataclasses.replace(CAPTIONS, objectives="sigmoid_pairs")
    imp = Imp.for_structures(tiny(), [CAPTIONS, pairwise])
    assert "offset_text_vision" in pairwise.groups(imp.config)
    assert "offset_text_vision" not in CAPTIONS.groups(imp.config)
    params = imp.init(0)
    assert params["offset_text_vision"]["value"] == -10.0
    gradients = jit(jax.grad(lambda params, batch: imp.loss(params, batch, pairwise)[0]))(params, batch(pairwise))
    assert abs(gradients["offset_text_vision"]["value"]) > 1e-3


def test_projection_uses_the_head_of_its_source(run):
    imp, params, _, features, _ = run
    for source, target in (("vision", "text"), ("text", "vision")):
        found = imp.project(params, jnp.asarray(features[source], jnp.float32), source=source, target=target)
        np.testing.assert_allclose(
            found, head(params["pair_text_vision"]["heads"][source], features[source]), rtol=1e-3, atol=1e-4
        )


def test_classification_looks_at_its_classes_only(run, jit):
    """Columns 0, 2 and 3 of five; the first sample has two labels among them, the last has only others."""
    imp, params, arrays, features, _ = run
    labels = np.array([[1, 1, 0, 1, 0], [0, 0, 1, 0, 1], [1, 0, 0, 0, 0], [0, 1, 0, 0, 1]], np.uint8)

    def loss(classifier, params, batch):
        return imp.loss({**params, "classifier_digits": classifier}, batch, DIGITS)[0]

    digits = {"vision": arrays["vision"], "labels": labels}
    value, gradient = jit(jax.value_and_grad(loss))(params["classifier_digits"], params, digits)
    linear = params["classifier_digits"]["linear"]
    logits = (features["vision"] @ linear["kernel"] + linear["bias"])[:, [0, 2, 3]]
    target = np.array([[0.5, 0, 0.5], [0, 1, 0], [1, 0, 0], [0, 0, 0]])
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(value, -(target * log_probs).sum(1).mean(), rtol=1e-4)
    bias = (np.exp(log_probs) * target.sum(1, keepdims=True) - target).mean(0)
    expected = np.zeros(5)
    expected[[0, 2, 3]] = bias
    np.testing.assert_allclose(gradient["linear"]["bias"], expected, rtol=1e-3, atol=1e-6)


def test_routing_statistics_of_a_loss(tiny, jit, batch):
    """Of each modality, layer by layer."""
    imp = Imp.for_structures(tiny(depth=2, moe=MoEConfig(4, 2)), [DIGITS])
    _, metrics = jit(lambda params, batch: imp.loss(params, batch, DIGITS))(imp.init(0), batch(DIGITS))
    assert set(metrics["moe"]) == {"vision"}
    statistics = metrics["moe"]["vision"]
    assert statistics["expert_load"].shape == statistics["expert_slots"].shape == (2, 4)
    np.testing.assert_allclose(statistics["expert_load"].sum(1), [1.0, 1.0], rtol=1e-5)
    assert statistics["unrouted_fraction"].shape == (2,)
    assert all(0 <= share < 1 for share in statistics["unrouted_fraction"])
    np.testing.assert_allclose(statistics["confidence"], 0.25, atol=0.1)  # near-uniform at the start


@pytest.mark.parametrize(("group", "expected"), [("tokens", [2]), ("sample", [1])])
def test_a_loss_routes_in_the_groups_of_its_structure(tiny, batch, group, expected):
    """Groups of up to 12 tokens: three samples of 4 tokens fit, two divide the batch of four."""
    imp = Imp.for_structures(tiny(moe=MoEConfig(2, 1, group=group, group_size=12)), [DIGITS])
    seen, forward = [], imp.forward

    def spy(*args, group_samples):
        seen.append(group_samples)
        return forward(*args, group_samples=group_samples)

    imp.forward = spy
    jax.eval_shape(lambda params, batch: imp.loss(params, batch, DIGITS), imp.shapes(), batch(DIGITS))
    assert seen == expected
