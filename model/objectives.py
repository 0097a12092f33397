"""The losses. Shape letters: B batch (global), K common space or classes. All in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from model import sharding, terms
from model.shapes import Array, Bool, Float, Int


def unit(x: Float[Array, "B K"]) -> Float[Array, "B K"]:
    """Rows at unit length; a row of zeros stays zero, and has a gradient of zero."""
    return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-12))


def nce(
    first: Float[Array, "B K"],
    second: Float[Array, "B K"],
    *,
    temperature: Float[Array, ""],
    positive_ids: Int[Array, "B 2"],
    chunk_size: int | None = None,
) -> Float[Array, ""]:
    """Symmetric noise-contrastive loss over the whole batch.

    ½ (lse over row − lse of its positives + the same over columns), mean over rows. Rows with equal ``positive_ids``
    (of 64 bits, as two words) are positives of each other; with all ids different this is the loss of CLIP and of the
    paper.
    first, second: of any length; the similarity is their cosine.
    chunk_size: columns that are compared at a time, forward and backward, so that a B x B matrix never exists; the
      loss is the same. None, or a batch that fits: all columns together.
    """
    if chunk_size is not None and chunk_size < first.shape[0]:
        return _nce_by_chunks(first, second, temperature, positive_ids, chunk_size)
    logits = unit(first) @ unit(second).T / temperature
    matched = jnp.where(_equal(positive_ids, positive_ids), logits, -jnp.inf)
    lse = jax.nn.logsumexp
    rows = lse(logits, axis=1) - lse(matched, axis=1)
    columns = lse(logits, axis=0) - lse(matched, axis=0)
    return 0.5 * (rows + columns).mean()


def _equal(ids: Int[Array, "B 2"], others: Int[Array, "C 2"]) -> Bool[Array, "B C"]:
    """Pairs of ids that agree in both words. jax has no 64-bit integers unless all its computations use them."""
    first, second = (ids[:, None, word] == others[None, :, word] for word in (0, 1))
    return first & second


# Finite substitute for -inf, whose differences would be NaN.
_LOWEST = -1e30


def _nce_by_chunks(
    first: jax.Array, second: jax.Array, temperature: Any, positive_ids: Any, chunk_size: int
) -> jax.Array:
    """A column's logsumexp is complete within its chunk; those of the rows grow from chunk to chunk (Milakov and
    Gimelshein 2018, arXiv 1805.02867)."""
    batch = first.shape[0]
    rows = unit(first) / temperature

    def body(carry: Any, chunk: tuple) -> tuple[Any, jax.Array]:
        columns, ids, real = chunk
        logits = rows @ columns.T
        everything = jnp.broadcast_to(real, logits.shape)
        matched = everything & _equal(positive_ids, ids)
        of_rows, of_positives = carry
        carry = _more(of_rows, logits, everything), _more(of_positives, logits, matched)
        # Columns that pad the last chunk belong to no sample: any finite value will do.
        matched = jnp.where(matched | ~real, logits, -jnp.inf)
        lse = jax.nn.logsumexp
        return carry, jnp.where(real, lse(logits, axis=0) - lse(matched, axis=0), 0.0).sum()

    chunks = _chunks(unit(second), positive_ids, chunk_size)
    start = (jnp.full(batch, _LOWEST), jnp.zeros(batch))
    (everything, positives), columns = jax.lax.scan(_keep_nothing(body), (start, start), chunks)
    of_rows = _logsumexp(everything) - _logsumexp(positives)
    return 0.5 * (of_rows.sum() + columns.sum()) / batch


def _more(state: tuple, logits: jax.Array, keep: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(highest logit of each row, sum of exp(logit - highest)) with more columns; ``keep`` marks those that count."""
    highest, total = state
    new = jnp.maximum(highest, jax.lax.stop_gradient(jnp.where(keep, logits, _LOWEST).max(1)))
    # Where nothing counts the exponent is 0 and its result unused, so that no gradient is infinite.
    terms = jnp.exp(jnp.where(keep, logits - new[:, None], 0.0))
    return new, total * jnp.exp(highest - new) + jnp.where(keep, terms, 0.0).sum(1)


def _logsumexp(state: tuple) -> jax.Array:
    highest, total = state
    return highest + jnp.log(total)


def _chunks(second: jax.Array, ids: Any, chunk_size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Columns (chunks, chunk_size, K), their ids, and which are real: the last chunk is filled up."""
    num_chunks = -(-second.shape[0] // chunk_size)
    missing = num_chunks * chunk_size - second.shape[0]
    # Gathered once: each device then compares its own rows with every column.
    columns, ids = sharding.replicate(second), sharding.replicate(ids)
    columns, ids = (jnp.pad(rows, ((0, missing), (0, 0))) for rows in (columns, ids))
    real = jnp.arange(num_chunks * chunk_size) < second.shape[0]
    columns, ids = (rows.reshape(num_chunks, chunk_size, -1) for rows in (columns, ids))
    return columns, ids, real.reshape(num_chunks, -1)


def _keep_nothing(body: Callable) -> Callable:
    return jax.checkpoint(body, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)


def sigmoid_pairs(
    first: Float[Array, "B K"],
    second: Float[Array, "B K"],
    *,
    temperature: Float[Array, ""],
    offset: Float[Array, ""],
    positive_ids: Int[Array, "B 2"],
    chunk_size: int | None = None,
) -> Float[Array, ""]:
    """The pairwise sigmoid loss of SigLIP (Zhai et al. 2023, arXiv 2303.15343), summed over columns, mean over rows.

    −log σ(±(cosine / temperature + offset)), + for rows of equal ``positive_ids``. chunk_size: as in ``nce``.
    """
    batch = first.shape[0]
    rows = unit(first) / temperature

    def body(total: jax.Array, chunk: tuple) -> tuple[jax.Array, None]:
        columns, ids, real = chunk
        logits = rows @ columns.T + offset
        sign = jnp.where(_equal(positive_ids, ids), 1.0, -1.0)
        return total - jnp.where(real, jax.nn.log_sigmoid(sign * logits), 0.0).sum(), None

    chunks = _chunks(unit(second), positive_ids, min(chunk_size or batch, batch))
    return jax.lax.scan(_keep_nothing(body), jnp.zeros(()), chunks)[0] / batch


def nested(
    loss: Callable, first: Float[Array, "B K"], second: Float[Array, "B K"], dims: tuple[int, ...], **kwargs: Any
) -> list[Float[Array, ""]]:
    """A contrastive loss of the leading dimensions alone, for each of several numbers of them.

    Each part of a vector is taken to unit length by itself, so that it can be used and searched without the rest.
    Matryoshka representations (Kusupati et al. 2022, arXiv 2205.13147, equation 1) train their weighted sum; the mean
    is that sum with every weight 1 / the number of parts.
    """
    return [loss(first[:, :dim], second[:, :dim], **kwargs) for dim in dims]


def softmax_cross_entropy(logits: Float[Array, "B K"], labels: Float[Array, "B K"]) -> Float[Array, ""]:
    """labels: multi-hot; normalised to sum to one a row (the release's form for several labels)."""
    target = labels / jnp.maximum(labels.sum(-1, keepdims=True), 1.0)
    return -(target * jax.nn.log_softmax(logits, axis=-1)).sum(-1).mean()


def sigmoid_cross_entropy(logits: Float[Array, "B K"], labels: Float[Array, "B K"]) -> Float[Array, ""]:
    """Binary cross-entropy of every class, mean over classes and rows (the release's)."""
    loss = -labels * jax.nn.log_sigmoid(logits) - (1.0 - labels) * jax.nn.log_sigmoid(-logits)
    return loss.mean()


# Name of a term → its function.
CLASSIFICATION = dict(zip(terms.CLASSIFICATION, (softmax_cross_entropy, sigmoid_cross_entropy), strict=True))
CONTRASTIVE = dict(zip(terms.CONTRASTIVE, (nce, sigmoid_pairs), strict=True))
