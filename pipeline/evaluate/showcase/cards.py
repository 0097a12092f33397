"""Cards: one row or one text with its best answers."""

from __future__ import annotations

import numpy as np

from pipeline.evaluate.showcase.answers import Classes, Texts
from pipeline.evaluate.showcase.sample import Sample

# Maximum number of cards of a kind, and of answers on each.
_MAX_CARDS, _TOP = 4, 5


def choice_cards(sample: Sample, modality: str, answers: Classes) -> list[dict]:
    """Media of the first rows, with the best answers."""
    return [
        {
            "picture": sample.pictures[modality][row],
            "wide": sample.is_film(modality),
            "truth": sample.truth(row),
            "answers": best_answers(sample, row, answers),
        }
        for row in _spread(sample.rows)
    ]


def best_answers(sample: Sample, row: int, answers: Classes) -> list[dict]:
    """The best answers for a row; a single one where it is certain."""
    best = np.argsort(-answers.scores[row], kind="stable")[:_TOP].tolist()
    return [
        {
            "text": answers.names[i],
            "score": round(float(answers.scores[row, i]), 4),
            "right": answers.is_right(sample, row, i),
        }
        for i in best
    ]


def search_cards(sample: Sample, modality: str, texts: Texts) -> list[dict]:
    """Texts with the media nearest to them."""
    cards = []
    for index in _spread(len(texts.names)):
        best = np.argsort(-texts.scores[:, index], kind="stable")[:_TOP].tolist()
        results = [
            {
                "picture": sample.spots[modality][row] or sample.pictures[modality][row],
                "text": sample.truth(row),
                "right": texts.is_right(sample, row, index),
            }
            for row in best
        ]
        cards.append({"query": texts.names[index], "results": results})
    return cards


def film_cards(sample: Sample, answers: dict[str, Classes]) -> list[dict]:
    """Films with a sound: the answers by their frames beside those by their sound."""
    if not {"video", "audio"} <= answers.keys():
        return []
    return [
        {
            "strip": sample.pictures["video"][row],
            "spectrogram": sample.pictures["audio"][row],
            "truth": sample.truth(row),
            "by_video": best_answers(sample, row, answers["video"]),
            "by_audio": best_answers(sample, row, answers["audio"]),
        }
        for row in _spread(sample.rows)[1:3]
    ]


def _spread(count: int) -> list[int]:
    """Places evenly spread over ``count``: neighbours are often alike."""
    return np.unique(np.linspace(0, count - 1, min(count, _MAX_CARDS)).astype(int)).tolist() if count else []
