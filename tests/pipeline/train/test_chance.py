"""The loss of guessing, by hand and against the losses themselves for features that are all alike."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from model import objectives
from model.structure import InputShape, Structure
from pipeline.train.chance import chance_of, is_guess

IMAGE, TEXT = InputShape("vision", 4, 768, 3), InputShape("text", 8, 0, 1)


def words(ids) -> np.ndarray:
    """Ids as a batch holds them: (samples, 2), the first word alike."""
    return np.stack([np.full(len(ids), -5), np.array(list(ids))], axis=1).astype(np.int32)


def contrast(batch: int, objective) -> Structure:
    more = {"classifier": "a", "num_classes": 5, "classes": (0, 1, 4)} if not isinstance(objective, str) else {}
    return Structure(objective, batch, (IMAGE, TEXT), **more)


def test_by_hand():
    ids = words(range(16))
    assert chance_of(contrast(16, "nce"), ids) == pytest.approx(math.log(16))
    # Of four rows two are alike: ln 4 twice, ln 2 twice.
    assert chance_of(contrast(4, "nce"), words([7, 7, 1, 2])) == pytest.approx(1.5 * math.log(2))
    assert chance_of(contrast(4, "nce"), words([0] * 4)) == 0
    # One pair in sixteen belongs together: 16 times the entropy of 1/16.
    entropy = -(math.log(1 / 16) / 16 + 15 / 16 * math.log(15 / 16))
    assert chance_of(contrast(16, "sigmoid_pairs"), ids) == pytest.approx(16 * entropy)
    assert chance_of(contrast(4, "sigmoid_pairs"), words([0] * 4)) == 0
    classify = {"classifier": "a", "num_classes": 5, "classes": (0, 1, 4)}
    assert chance_of(Structure("softmax", 8, (IMAGE,), **classify), None) == pytest.approx(math.log(3))
    assert chance_of(Structure("sigmoid", 8, (IMAGE,), **classify), None) == pytest.approx(math.log(2))
    both = contrast(16, (("nce", 2.0), ("softmax", 0.5)))
    assert chance_of(both, ids) == pytest.approx(2 * math.log(16) + 0.5 * math.log(3))


def test_a_process_sees_its_part_of_the_batch():
    """Two of its eight rows are alike, so one in seven others is; of 63 others nine are."""
    found = chance_of(contrast(64, "nce"), words([0, 0, 1, 1, 2, 2, 3, 3]))
    assert found == pytest.approx(math.log(64 / 10))
    assert chance_of(contrast(8, "nce"), words([3])) == pytest.approx(math.log(8))


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 2, 2], [4] * 6])
def test_the_losses_of_features_that_are_all_alike(ids):
    features, share, ids = jnp.ones((6, 3)), float(np.mean(np.equal.outer(ids, ids))), words(ids)
    one = jnp.float32(1.0)
    nce = objectives.nce(features, features, temperature=one, positive_ids=jnp.array(ids))
    assert chance_of(contrast(6, "nce"), ids) == pytest.approx(float(nce), abs=1e-5)
    # The offset at which a pair is as likely as pairs are.
    offset = jnp.float32(math.log(share / (1 - share)) - 1 if share < 1 else 40.0)
    pairs = objectives.sigmoid_pairs(features, features, temperature=one, offset=offset, positive_ids=jnp.array(ids))
    assert chance_of(contrast(6, "sigmoid_pairs"), ids) == pytest.approx(float(pairs), abs=1e-4)


def test_a_guess():
    assert is_guess(2.771, math.log(16)) and is_guess(2.9, math.log(16)) and not is_guess(2.7, math.log(16))
    assert not is_guess(0.0, 0.0)
