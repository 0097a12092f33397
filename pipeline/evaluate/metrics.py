"""Metrics over numpy arrays, named as in CLIP_benchmark."""

from __future__ import annotations

import numpy as np


def classification(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """scores (n, classes), labels (n,) → acc1, acc5 (of more than five classes), mean_per_class_recall."""
    ranked = np.argsort(-scores, axis=1, kind="stable")
    top = ranked[:, 0]
    out = {"acc1": float((top == labels).mean())}
    if scores.shape[1] > 5:
        out["acc5"] = float((ranked[:, :5] == labels[:, None]).any(1).mean())
    recalls = [(top[labels == c] == c).mean() for c in np.unique(labels)]
    return out | {"mean_per_class_recall": float(np.mean(recalls))}


def retrieval(images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> dict[str, float]:
    """images (n, K) and texts (m, K) of unit length; owner (m,): the image that each text describes.

    image_retrieval_recall@k: share of texts whose image is among the k nearest; text_retrieval_recall@k: share of
    images with one of their texts among the k nearest. Ties count against: a constant model gets no more than chance.
    """
    similarity = texts @ images.T
    own = owner[:, None] == np.arange(len(images))[None, :]
    # A similarity that is not finite counts as the worst for its own pair and the best for every other.
    mine = np.where(np.isfinite(similarity), similarity, -np.inf)
    others = np.where(own, -np.inf, np.where(np.isfinite(similarity), similarity, np.inf))
    own_score = mine[np.arange(len(texts)), owner]
    image_rank = 1 + (others >= own_score[:, None]).sum(1) - np.isneginf(own_score)
    best = np.where(own, mine, -np.inf).max(0)
    text_rank = 1 + (others >= best[None, :]).sum(0) - own.sum(0) * np.isneginf(best)
    out = {}
    for k in (1, 5, 10):
        out[f"image_retrieval_recall@{k}"] = float((image_rank <= k).mean())
        out[f"text_retrieval_recall@{k}"] = float((text_rank <= k).mean())
    return out | {"image_retrieval_median_rank": float(np.median(image_rank))}
