"""Common spaces in two dimensions, by their two directions of largest variance (PCA)."""

from __future__ import annotations

import numpy as np

from pipeline.evaluate.showcase.answers import Texts
from pipeline.evaluate.showcase.sample import Sample
from pipeline.export.features import unit

# Maximum number of media, of words, and of characters of a word.
_MAX_MEDIA, _MAX_WORDS, _MAX_CHARACTERS = 40, 14, 18


def plane(groups: list[np.ndarray], *, centred: bool) -> list[np.ndarray]:
    """(n, 2) for each group of vectors. centred: each group about its own mean, which the distance of groups hides."""
    whole = np.concatenate(groups).astype(np.float64)
    parts = [np.asarray(g, np.float64) - (g.mean(0) if centred else whole.mean(0)) for g in groups]
    axes = np.linalg.svd(np.concatenate(parts), full_matrices=False)[2][:2]
    # The sign of a direction is arbitrary: its largest component is positive, so that pages can be compared.
    axes = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])[:, None]
    return [np.pad(part @ axes.T, ((0, 0), (0, 2 - len(axes)))) for part in parts]


def pair_map(sample: Sample, modality: str, texts: Texts) -> dict:
    """The common space of a modality and text: media and words."""
    rows = np.unique(np.linspace(0, sample.rows - 1, min(sample.rows, _MAX_MEDIA)).astype(int)).tolist()
    # Captions are longer than names of classes.
    most = _MAX_WORDS if texts.is_exclusive else _MAX_WORDS // 2
    words = np.unique(np.linspace(0, len(texts.names) - 1, min(len(texts.names), most)).astype(int)).tolist()
    media, named = plane([texts.media[rows], texts.anchors[words]], centred=True)
    points = [_media_point(sample, modality, row, place) for row, place in zip(rows, media, strict=True)]
    points += [_point(place, "text", texts.names[i]) for i, place in zip(words, named, strict=True)]
    note = "the space of both, each about its own mean"
    return {"title": f"{sample.data_set.name}: {modality} and text", "note": note, "points": points}


def encoder_map(samples: list[Sample]) -> dict | None:
    """All media in the features of the encoder, before any head; None of a single modality."""
    kinds = [(sample, modality) for sample in samples for modality in sample.features]
    if len(kinds) < 2:
        return None
    each = max(4, _MAX_MEDIA * 2 // len(kinds))
    rows = [np.unique(np.linspace(0, s.rows - 1, min(s.rows, each)).astype(int)).tolist() for s, _ in kinds]
    vectors = [unit(s.features[m][chosen]) for (s, m), chosen in zip(kinds, rows, strict=True)]
    points = [
        _media_point(sample, modality, row, place)
        for (sample, modality), chosen, places in zip(kinds, rows, plane(vectors, centred=False), strict=True)
        for row, place in zip(chosen, places, strict=True)
    ]
    return {"title": "All media in the encoder", "note": "its features, before any head", "points": points}


def _media_point(sample: Sample, modality: str, row: int, place: np.ndarray) -> dict:
    point = _point(place, modality, sample.truth(row))
    spot = sample.spots[modality][row]
    return point | ({"picture": spot} if spot else {})


def _point(place: np.ndarray, kind: str, label: str) -> dict:
    short = label if len(label) <= _MAX_CHARACTERS else label[: _MAX_CHARACTERS - 1] + "…"
    return {"x": round(float(place[0]), 4), "y": round(float(place[1]), 4), "kind": kind, "label": short}
