"""The terms of a task's loss by name, and what follows from them and from the task's modalities.

Free of jax, so that a recipe can be checked without it; ``objectives`` has the functions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

# Terms that compare modalities, and terms that need a classifier.
CONTRASTIVE = ("nce", "sigmoid_pairs")
CLASSIFICATION = ("softmax", "sigmoid")
NAMES = (*CONTRASTIVE, *CLASSIFICATION)


def contrastive(names: Iterable[str]) -> tuple[str, ...]:
    """Those that compare modalities."""
    return tuple(name for name in names if name in CONTRASTIVE)


def classification(names: Iterable[str]) -> tuple[str, ...]:
    """Those that need a classifier."""
    return tuple(name for name in names if name in CLASSIFICATION)


def classified(modalities: Iterable[str]) -> str:
    """The modality that a classifier looks at: the first that is not text, if there is one."""
    modalities = tuple(modalities)
    return next((name for name in modalities if name != "text"), modalities[0])


def pairs(modalities: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """The pairs that a contrastive term compares."""
    return tuple(itertools.combinations(sorted(modalities), 2))


def pair_name(pair: Iterable[str]) -> str:
    """The name of an unordered pair, such as "audio_text"."""
    return "_".join(sorted(pair))


def spaces(pairs: Iterable[tuple[str, str]], *, heads: str) -> tuple[tuple[str, ...], ...]:
    """The common spaces by the modalities that can be compared there.

    pairs: those that are trained. With heads "per_pair" each has a space of its own; with "per_modality" all modalities
    that a chain of pairs connects share one.
    """
    if heads == "per_pair":
        return tuple(pairs)
    found: list[set[str]] = []
    for pair in pairs:
        joined = [space for space in found if space & set(pair)]
        found = [space for space in found if space not in joined] + [set(pair).union(*joined)]
    return tuple(sorted(tuple(sorted(space)) for space in found))
