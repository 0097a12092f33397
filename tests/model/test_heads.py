"""One head a modality into one space, and losses of leading dimensions, against float64 numpy."""

import jax
import numpy as np
import pytest

from model import terms
from model.imp import Imp
from model.structure import InputShape, Structure
from tests.model.reference import head, unit

VISION = InputShape("vision", num_tokens=4, num_values=12, num_axes=3)
AUDIO = InputShape("audio", num_tokens=3, num_values=4, num_axes=2)
TEXT = InputShape("text", num_tokens=5, num_values=0, num_axes=1)
SOUNDS = Structure("nce", 4, (VISION, AUDIO))
CAPTIONS = Structure("nce", 4, (VISION, TEXT))
TRIPLET = Structure("nce", 4, (VISION, AUDIO, TEXT))
DIMS = (2, 5, 12)


@pytest.fixture
def one_space(tiny):
    return tiny(heads="per_modality")


def test_a_modality_has_one_head_whatever_it_is_compared_with(one_space):
    assert CAPTIONS.groups(one_space)[3:] == ("head_text", "head_vision", "pair_text_vision")
    imp = Imp.for_structures(one_space, [SOUNDS, CAPTIONS])
    heads = ("head_audio", "head_text", "head_vision")
    assert imp.groups[-5:] == (*heads, "pair_audio_vision", "pair_text_vision")
    assert imp.shapes()["pair_text_vision"].keys() == {"tau"}
    left_out = Structure("nce", 4, (VISION, AUDIO, TEXT), pair_weights=(("audio_text", 0.0), ("audio_vision", 0.0)))
    assert left_out.groups(one_space)[4:] == ("head_text", "head_vision", "pair_text_vision")


@pytest.mark.parametrize(
    ("heads", "pairs", "expected"),
    [
        ("per_pair", ["ab", "bc"], ["ab", "bc"]),
        ("per_modality", ["ab", "bc"], ["abc"]),
        ("per_modality", ["ab", "cd"], ["ab", "cd"]),
        ("per_modality", ["ab", "cd", "ef", "bc"], ["abcd", "ef"]),
        ("per_modality", [], []),
    ],
)
def test_spaces_are_of_modalities_that_a_chain_of_pairs_connects(heads, pairs, expected):
    assert terms.spaces([tuple(pair) for pair in pairs], heads=heads) == tuple(tuple(space) for space in expected)


@pytest.mark.parametrize("dims", [(4,), (12, 4), (4, 4, 12), (0, 12), (4, 16)])
def test_leading_dimensions_ascend_to_the_whole_vector(tiny, dims):
    with pytest.raises(ValueError, match="ascending numbers of dimensions of which the last is common_dim 12, found"):
        tiny(matryoshka=dims)


def numpy_loss(first, second, tau: float) -> float:
    """Of different samples: cross-entropy of rows and of columns, whose right answers are on the diagonal."""
    weight = np.exp(unit(first) @ unit(second).T / tau)
    own = np.diag(weight)
    return -(np.log(own / weight.sum(1)) + np.log(own / weight.sum(0))).mean() / 2


def test_the_loss_is_the_mean_over_pairs_and_leading_dimensions(tiny, jit, batch):
    imp = Imp.for_structures(tiny(heads="per_modality", matryoshka=DIMS), [TRIPLET])
    params, arrays = imp.init(0), batch(TRIPLET)
    taus = dict(zip(TRIPLET.pairs, (0.1, 0.3, 0.5), strict=True))
    for (a, b), tau in taus.items():
        params[f"pair_{a}_{b}"]["tau"] = np.float32(tau)

    @jit
    def features_and_loss(params, batch):
        features = {m: imp.encode(params, m, **batch[m]) for m in ("vision", "audio", "text")}
        projected = imp.project(params, features["text"], source="text", target="audio")
        return features, projected, imp.loss(params, batch, TRIPLET)

    features, projected, (loss, metrics) = features_and_loss(params, arrays)
    vectors = {m: head(params[f"head_{m}"], np.asarray(f, np.float64)) for m, f in features.items()}
    np.testing.assert_allclose(projected, vectors["text"], rtol=1e-3, atol=1e-4)
    expected = {
        f"nce_{a}_{b}_dim{d}": numpy_loss(vectors[a][:, :d], vectors[b][:, :d], tau)
        for (a, b), tau in taus.items()
        for d in DIMS
    }
    assert np.ptp(list(expected.values())) > 0.1
    np.testing.assert_allclose(loss, np.mean(list(expected.values())), rtol=1e-4)
    found = {name: float(value) for name, value in metrics["losses"].items()}
    of_pairs = {f"nce_{a}_{b}": np.mean([expected[f"nce_{a}_{b}_dim{d}"] for d in DIMS]) for a, b in taus}
    assert found == pytest.approx(expected | of_pairs, rel=1e-4)


def test_the_full_dimension_alone_changes_no_bit(tiny, jit):
    """Loss, and gradients of heads, temperature, offset and features; features are given, so the rest is the same."""
    structure = Structure("sigmoid_pairs", 4, (AUDIO, TEXT))
    rng, found = np.random.default_rng(0), []
    features = {m: rng.normal(size=(4, 16)).astype(np.float32) for m in ("audio", "text")}
    ids = np.array([[0, 0], [0, 1], [0, 0], [0, 2]], np.int32)
    for dims in ((), (12,)):
        imp = Imp.for_structures(tiny(matryoshka=dims, contrastive_chunk=3), [structure])

        def both(params, features, ids, imp=imp):
            return sum(imp._contrast(name, params, features, ids, structure)[0] for name in ("nce", "sigmoid_pairs"))

        params = {name: p for name, p in imp.init(0).items() if name in ("pair_audio_text", "offset_audio_text")}
        found.append(jit(jax.value_and_grad(both, argnums=(0, 1)))(params, features, ids))
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found[0]))


def test_modalities_that_no_task_compares_have_the_mean_temperature_of_their_space(one_space):
    imp = Imp.for_structures(one_space, [SOUNDS, CAPTIONS])
    params = imp.init(0)
    params["pair_audio_vision"]["tau"], params["pair_text_vision"]["tau"] = np.float32(0.1), np.float32(0.4)
    assert float(imp.temperature(params, "vision", "text")) == np.float32(0.4)
    np.testing.assert_allclose(imp.temperature(params, "text", "audio"), 0.2, rtol=1e-6)
    apart = Imp.for_structures(one_space, [CAPTIONS])
    with pytest.raises(ValueError, match="audio and text share no common space; known: text_vision"):
        apart.temperature(params, "audio", "text")
