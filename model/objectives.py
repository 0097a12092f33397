"""The losses. Shape letters: B batch (global), K common space or classes. All in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def unit(x: Float[Array, "B K"]) -> Float[Array, "B K"]:
    """Rows at unit length; a row of zeros stays zero, and has a gradient of zero."""
    return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-12))


def nce(
    first: Float[Array, "B K"],
    second: Float[Array, "B K"],
    *,
    temperature: Float[Array, ""],
    positive_ids: Int[Array, " B"],
) -> Float[Array, ""]:
    """Symmetric noise-contrastive loss over the whole batch.

    ½ (lse over row − lse of its positives + the same over columns), mean over rows. Rows with equal ``positive_ids``
    are positives of each other; with all ids different this is the loss of CLIP and of the paper.
    first, second: of any length; the similarity is their cosine.
    """
    logits = unit(first) @ unit(second).T / temperature
    positive = positive_ids[:, None] == positive_ids[None, :]
    matched = jnp.where(positive, logits, -jnp.inf)
    lse = jax.nn.logsumexp
    rows = lse(logits, axis=1) - lse(matched, axis=1)
    columns = lse(logits, axis=0) - lse(matched, axis=0)
    return 0.5 * (rows + columns).mean()


def softmax_cross_entropy(logits: Float[Array, "B K"], labels: Float[Array, "B K"]) -> Float[Array, ""]:
    """labels: multi-hot; normalised to sum to one a row (the release's form for several labels)."""
    target = labels / jnp.maximum(labels.sum(-1, keepdims=True), 1.0)
    return -(target * jax.nn.log_softmax(logits, axis=-1)).sum(-1).mean()


def sigmoid_cross_entropy(logits: Float[Array, "B K"], labels: Float[Array, "B K"]) -> Float[Array, ""]:
    """Binary cross-entropy of every class, summed over classes, mean over rows."""
    loss = -labels * jax.nn.log_sigmoid(logits) - (1.0 - labels) * jax.nn.log_sigmoid(-logits)
    return loss.sum(-1).mean()


CLASSIFICATION = {"softmax": softmax_cross_entropy, "sigmoid": sigmoid_cross_entropy}
OBJECTIVES = ("nce", *CLASSIFICATION)
