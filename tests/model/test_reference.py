"""``Imp.loss`` against float64 numpy: values, and the gradient of every parameter array along a direction."""

import jax
import numpy as np
import pytest

from model.config import MoEConfig
from model.imp import Imp
from model.structure import Structure
from tests.model.reference import Reference

CLASSES = {"classifier": "digits", "num_classes": 4, "classes": (0, 1, 3)}
TRIPLET = {"pair_weights": (("audio_text", 0.5), ("audio_vision", 2.0))}
SUM = (("nce", 1.0), ("softmax", 0.5))
# (fields of the model, the objective, samples, tokens of each modality, other fields of the structure)
CASES = {
    "a dense classifier of several labels": ({"depth": 2}, "sigmoid", 6, {"audio": 5}, CLASSES),
    "experts choose, three modalities, z-loss": (
        {"moe": MoEConfig(3, 1, z_loss_weight=0.02), "qk_norm": True, "position_scale": 0.4},
        "nce",
        4,
        {"audio": 4, "text": 7, "vision": 5},
        TRIPLET,
    ),
    "tokens choose by priority, two towers, a weighted sum": (
        {
            "depth": 4,
            "moe": MoEConfig(
                4,
                2,
                router="tokens_choose",
                num_selected=2,
                batch_priority=True,
                capacity_factor=0.8,
                load_balance_weight=0.1,
                placement="interleaved",
                group="tokens",
                group_size=12,
                dispatch="einsum",
            ),
            "towers": "per_modality",
            "contrastive_chunk": 4,
        },
        SUM,
        6,
        {"text": 6, "vision": 4},
        CLASSES,
    ),
    "one head a modality, leading dimensions": (
        {"moe": MoEConfig(3, 1), "heads": "per_modality", "matryoshka": (3, 8, 12), "contrastive_chunk": 3},
        (("nce", 1.0), ("sigmoid_pairs", 0.5)),
        4,
        {"audio": 4, "text": 5, "vision": 5},
        TRIPLET,
    ),
    "experts choose in groups with padding, pairs by sigmoid": (
        {
            "depth": 2,
            "moe": MoEConfig(4, 1, capacity_factor=1.5, group="tokens", group_size=14, route_padding=True),
        },
        "sigmoid_pairs",
        6,
        {"audio": 5, "text": 7},
        {},
    ),
}


def drawn(params: dict, rng: np.random.Generator) -> dict:
    """Parameters of which none is zero or one, with routers that prefer clearly."""

    def draw(path, p):
        names = [key.key for key in path]
        if names[-1] in ("tau", "value"):
            return np.float32({"tau": 0.4, "value": -1.0}[names[-1]])
        noise = rng.normal(size=p.shape).astype(np.float32)
        if "router" in names:
            return 0.7 * noise
        return np.asarray(p) + (0.2 * noise if names[-1] in ("scale", "bias") else 0)

    return jax.tree.map_with_path(draw, params)


def batch_for(structure: Structure, batch) -> dict:
    """Two samples with the same id, and several labels a sample."""
    arrays = batch(structure, seed=3)
    if structure.contrastive:
        arrays["positive_ids"][3] = arrays["positive_ids"][1]
    if structure.classification:
        arrays["labels"] |= np.roll(arrays["labels"], 1, axis=0)
    return arrays


# The others take seconds of compiling each.
_QUICK = "a dense classifier of several labels"


@pytest.fixture(
    scope="module", params=[_QUICK, *(pytest.param(c, marks=pytest.mark.slow) for c in CASES if c != _QUICK)]
)
def case(request, tiny, inputs, batch):
    fields, objective, size, tokens, more = CASES[request.param]
    structure = Structure(objective, size, tuple(inputs(m, n) for m, n in tokens.items()), **more)
    config = tiny(**fields)
    imp, arrays = Imp.for_structures(config, [structure]), batch_for(structure, batch)
    for seed in range(30):
        params = drawn(imp.init(0), np.random.default_rng(seed))
        reference = Reference(config, structure)
        expected = reference.loss(in_float64(params), arrays)
        # Where a router decides by less, rounding or a step of the differences could turn it.
        if reference.margin > 1e-4:
            return imp, structure, params, arrays, expected
    raise AssertionError("no draw without near ties")


def in_float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def test_loss_and_gradients_are_the_formulas(case, jit):
    """Central differences of the reference, one array at a time in a direction drawn for it."""
    imp, structure, params, arrays, expected_loss = case
    found, gradients = jit(jax.value_and_grad(lambda p, b: imp.loss(p, b, structure)[0]))(params, arrays)
    reference, rng, step = Reference(imp.config, structure), np.random.default_rng(2), 1e-5
    np.testing.assert_allclose(found, expected_loss, rtol=3e-6)
    leaves, tree = jax.tree.flatten(in_float64(params))
    largest = max(np.linalg.norm(g) for g in jax.tree.leaves(gradients))
    for number, (path, gradient) in enumerate(jax.tree.leaves_with_path(gradients)):
        direction = rng.normal(size=gradient.shape)
        direction /= np.linalg.norm(direction) / np.sqrt(direction.size)

        def along(distance: float, number=number, direction=direction) -> float:
            moved = [leaf + distance * direction if i == number else leaf for i, leaf in enumerate(leaves)]
            return reference.loss(jax.tree.unflatten(tree, moved), arrays)

        expected = (along(step) - along(-step)) / (2 * step)
        error = abs((np.asarray(gradient, np.float64) * direction).sum() - expected)
        assert error <= 1e-3 * np.linalg.norm(gradient) + 1e-6 * largest, jax.tree_util.keystr(path)
