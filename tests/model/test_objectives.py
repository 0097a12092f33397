"""Losses against hand-worked numbers and float64 references written as loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import objectives
from model.objectives import nce, sigmoid_cross_entropy, sigmoid_pairs, softmax_cross_entropy, unit


def words(ids) -> jax.Array:
    """Ids as the losses take them: two words, neither of which tells two ids apart alone."""
    return jnp.stack([jnp.asarray(ids, jnp.int32) % 2, jnp.asarray(ids, jnp.int32) // 2], axis=-1)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@jax.jit
def loss_and_gradients(first, second, temperature, ids):
    def loss(first, second, temperature):
        return nce(first, second, temperature=temperature, positive_ids=ids)

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(first, second, temperature)


def contrast(first, second, temperature, ids) -> float:
    first, second = (np.asarray(x, np.float32) for x in (first, second))
    return float(loss_and_gradients(first, second, np.float32(temperature), words(list(ids)))[0])


def nce_by_loops(first, second, temperature, ids) -> float:
    first, second = (x.astype(np.float64) for x in (first, second))
    size, total = len(ids), 0.0
    similarity = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in second] for a in first])
    weight = np.exp(similarity / temperature)
    for i in range(size):
        same = [j for j in range(size) if ids[j] == ids[i]]
        total += np.log(weight[i].sum()) - np.log(sum(weight[i, j] for j in same))
        total += np.log(weight[:, i].sum()) - np.log(sum(weight[j, i] for j in same))
    return total / (2 * size)


def test_nce_with_different_ids_is_the_loss_of_clip():
    first, second = normal(6, 5, seed=1), 3 * normal(6, 5, seed=2)
    logits = np.zeros((6, 6))
    for i, j in np.ndindex(6, 6):
        a, b = first[i].astype(np.float64), second[j].astype(np.float64)
        logits[i, j] = a @ b / np.linalg.norm(a) / np.linalg.norm(b) / 0.2
    of_rows = [-np.log(np.exp(logits[i, i]) / np.exp(logits[i]).sum()) for i in range(6)]
    of_columns = [-np.log(np.exp(logits[i, i]) / np.exp(logits[:, i]).sum()) for i in range(6)]
    expected = (np.mean(of_rows) + np.mean(of_columns)) / 2
    assert abs(np.mean(of_rows) - np.mean(of_columns)) > 0.01  # both directions count
    np.testing.assert_allclose(contrast(first, second, 0.2, [0, 5, 2, 9, 4, 3]), expected, rtol=1e-5)


@pytest.mark.parametrize("ids", [[1, 2, 3, 4, 5, 6], [1, 1, 3, 1, 5, 3], [2, 2, 2, 2, 2, 2]])
def test_nce_with_equal_ids_against_numpy(ids):
    first, second = normal(6, 5, seed=1), normal(6, 5, seed=2)
    expected = nce_by_loops(first, second, 0.3, ids)
    np.testing.assert_allclose(contrast(first, second, 0.3, ids), expected, rtol=1e-5, atol=1e-6)


def test_nce_by_hand():
    """Orthogonal samples that match themselves: logits are 1 / temperature on the diagonal, 0 elsewhere."""
    np.testing.assert_allclose(contrast(np.eye(2), np.eye(2), 0.5, [0, 1]), np.log(1 + np.exp(-2)), rtol=1e-5)
    # Samples 0 and 1 are positives of each other: ln(e + 2) - ln(e + 1) twice; sample 2: ln(e + 2) - 1.
    expected = (2 * (np.log(np.e + 2) - np.log(np.e + 1)) + np.log(np.e + 2) - 1) / 3
    np.testing.assert_allclose(contrast(np.eye(3), np.eye(3), 1.0, [7, 7, 9]), expected, rtol=1e-5)
    assert contrast(np.eye(3), np.eye(3), 1.0, [4, 4, 4]) == pytest.approx(0.0, abs=1e-6)


def test_nce_is_of_the_cosine():
    first, second = normal(6, 5, seed=1), normal(6, 5, seed=2)
    lengths = np.array([[0.01], [1], [2], [30], [400], [5]], np.float32)
    found = contrast(lengths * first, 7 * second, 0.2, range(6))
    np.testing.assert_allclose(found, nce_by_loops(first, second, 0.2, range(6)), rtol=1e-5)


def test_nce_gradients_against_finite_differences():
    first, second, ids = normal(4, 3, seed=3), normal(4, 3, seed=4), [1, 2, 1, 3]
    _, gradients = loss_and_gradients(first, second, np.float32(0.5), words(list(ids)))
    direction = [normal(4, 3, seed=5).astype(np.float64), normal(4, 3, seed=6).astype(np.float64), 0.7]

    def along(step: float) -> float:
        moved = [x + step * d for x, d in zip((first, second, 0.5), direction, strict=True)]
        return nce_by_loops(*moved, ids)

    expected = (along(1e-5) - along(-1e-5)) / 2e-5
    found = sum((np.asarray(g, np.float64) * d).sum() for g, d in zip(gradients, direction, strict=True))
    np.testing.assert_allclose(found, expected, rtol=1e-3)


@pytest.mark.parametrize("temperature", [1e-2, 1e-4])
def test_nce_is_finite_at_large_logits(temperature):
    swapped = np.array([[0, 1], [1, 0]], np.float32)  # every sample is nearest to the wrong one
    value, gradients = loss_and_gradients(np.eye(2, dtype=np.float32), swapped, np.float32(temperature), words([0, 1]))
    np.testing.assert_allclose(value, 1 / temperature, rtol=1e-5)
    assert all(np.isfinite(g).all() for g in gradients)


def test_unit_rows():
    found = unit(jnp.asarray([[3.0, 4.0], [0.0, 0.0], [-2.0, 0.0]]))
    np.testing.assert_allclose(found, [[0.6, 0.8], [0, 0], [-1, 0]], rtol=1e-6)


def test_nce_gradient_is_finite_at_a_row_of_zeros():
    first = np.array([[1, 0], [0, 0]], np.float32)
    value, gradients = loss_and_gradients(first, np.eye(2, dtype=np.float32), np.float32(1.0), words([0, 1]))
    # Logits [[1, 0], [0, 0]]: rows ln(e + 1) - 1 and ln 2, columns the same.
    np.testing.assert_allclose(value, (np.log(np.e + 1) - 1 + np.log(2)) / 2, rtol=1e-5)
    assert all(np.isfinite(g).all() for g in gradients)


@functools.cache
def chunked(chunk_size: int | None):
    """(first, second, temperature, ids) → loss and gradients, compiled once for each chunk size."""

    def loss(first, second, temperature, ids):
        return nce(first, second, temperature=temperature, positive_ids=ids, chunk_size=chunk_size)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))


@pytest.mark.parametrize("temperature", [0.3, 0.01])
@pytest.mark.parametrize("ids", [range(11), [1, 1, 3, 1, 5, 3, 7, 1, 9, 9, 3], [2] * 11])
@pytest.mark.parametrize("chunk_size", [3, 5, 10, 11])
def test_nce_by_chunks_equals_nce(ids, chunk_size, temperature):
    """Value and gradients by both sides and the temperature; the last chunk has 2, 1, 1 and 11 columns."""
    first, second, ids = normal(11, 6, seed=1), normal(11, 6, seed=2), words(list(ids))

    given = (first, second, jnp.float32(temperature), ids)
    value, gradients = chunked(chunk_size)(*given)
    expected, expected_gradients = chunked(None)(*given)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
    for found, other in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, other, rtol=1e-4, atol=1e-4 * max(0.1, np.abs(other).max()))


def test_nce_by_chunks_never_holds_the_whole_matrix():
    """65,536 pairs: the plain form needs matrices of 17 GB; compiled only."""
    shape, ids = jax.ShapeDtypeStruct((65_536, 64), jnp.float32), jax.ShapeDtypeStruct((65_536, 2), jnp.int32)

    def loss(first, second, ids):
        return nce(first, second, temperature=jnp.float32(0.1), positive_ids=ids, chunk_size=1024)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(shape, shape, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 65_536 * 65_536 * 4 / 10


def sigmoid_pairs_by_loops(first, second, temperature, offset, ids) -> float:
    total = 0.0
    for a, own in zip(first.astype(np.float64), ids, strict=True):
        for b, other in zip(second.astype(np.float64), ids, strict=True):
            logit = a @ b / np.linalg.norm(a) / np.linalg.norm(b) / temperature + offset
            total += np.log1p(np.exp(-logit if own == other else logit))
    return total / len(ids)


@pytest.mark.parametrize("chunk_size", [None, 3, 7])
@pytest.mark.parametrize("ids", [range(7), [1, 1, 3, 1, 5, 3, 8]])
def test_sigmoid_pairs_against_numpy(ids, chunk_size):
    first, second = normal(7, 5, seed=1), 3 * normal(7, 5, seed=2)

    def loss(first, second, temperature, offset):
        scale = {"temperature": temperature, "offset": offset}
        return sigmoid_pairs(first, second, **scale, positive_ids=words(list(ids)), chunk_size=chunk_size)

    given = (first, second, jnp.float32(0.2), jnp.float32(-2.0))
    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*given)
    np.testing.assert_allclose(value, sigmoid_pairs_by_loops(first, second, 0.2, -2.0, ids), rtol=1e-5)
    direction = [normal(7, 5, seed=3).astype(np.float64), normal(7, 5, seed=4).astype(np.float64), 0.1, 0.5]

    def along(step: float) -> float:
        moved = [x + step * d for x, d in zip((first, second, 0.2, -2.0), direction, strict=True)]
        return sigmoid_pairs_by_loops(*moved, ids)

    found = sum((np.asarray(g, np.float64) * d).sum() for g, d in zip(gradients, direction, strict=True))
    np.testing.assert_allclose(found, (along(1e-5) - along(-1e-5)) / 2e-5, rtol=1e-3)


def test_sigmoid_pairs_by_hand():
    """Two orthogonal samples that match themselves, temperature 1: logits 1 + offset and offset."""
    given = {"temperature": jnp.float32(1.0), "offset": jnp.float32(-1.0), "positive_ids": words([0, 1])}
    value = sigmoid_pairs(jnp.eye(2), jnp.eye(2), **given)
    np.testing.assert_allclose(value, np.log(2) + np.log1p(np.exp(-1)), rtol=1e-6)


def value_and_gradient(loss, logits, labels):
    logits, labels = (jnp.asarray(x, jnp.float32) for x in (logits, labels))
    return jax.jit(jax.value_and_grad(loss))(logits, labels)


def test_softmax_cross_entropy_by_hand():
    # Probabilities (1/4, 3/4): one label costs ln(4/3), two halves cost (ln 4 + ln(4/3)) / 2, no label nothing.
    logits = [[0, np.log(3)]] * 3
    value, gradient = value_and_gradient(softmax_cross_entropy, logits, [[0, 1], [1, 1], [0, 0]])
    np.testing.assert_allclose(value, (np.log(4 / 3) + (np.log(4) + np.log(4 / 3)) / 2) / 3, rtol=1e-6)
    expected = np.array([[1 / 4, 3 / 4 - 1], [1 / 4 - 1 / 2, 3 / 4 - 1 / 2], [0, 0]]) / 3
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


def test_sigmoid_cross_entropy_by_hand():
    # Sigmoids (1/2, 3/4): mean over two classes and three rows.
    logits = [[0, np.log(3)]] * 3
    value, gradient = value_and_gradient(sigmoid_cross_entropy, logits, [[1, 0], [1, 1], [0, 0]])
    rows = [np.log(2) + np.log(4), np.log(2) + np.log(4 / 3), np.log(2) + np.log(4)]
    np.testing.assert_allclose(value, np.mean(rows) / 2, rtol=1e-6)
    expected = np.array([[-1 / 2, 3 / 4], [-1 / 2, -1 / 4], [1 / 2, 3 / 4]]) / 6
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("loss", "expected", "expected_gradient"),
    [
        (softmax_cross_entropy, 2e4, [[1.0, -1.0]]),
        (sigmoid_cross_entropy, 1e4, [[0.5, -0.5]]),  # 1e4 for each of the two classes
    ],
)
def test_cross_entropy_is_finite_at_large_logits(loss, expected, expected_gradient):
    value, gradient = value_and_gradient(loss, [[1e4, -1e4]], [[0, 1]])
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6)


def test_every_term_has_its_function():
    assert {"nce": objectives.nce, "sigmoid_pairs": objectives.sigmoid_pairs} == objectives.CONTRASTIVE
    softmax, sigmoid = objectives.softmax_cross_entropy, objectives.sigmoid_cross_entropy
    assert {"softmax": softmax, "sigmoid": sigmoid} == objectives.CLASSIFICATION
