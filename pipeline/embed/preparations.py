"""Which of a model's inputs an item is prepared as, for every common space that its modality leads to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from pipeline.data.modalities import TEXT
from pipeline.errors import RequestError, some_of
from pipeline.export import Encoder
from pipeline.export.choices import FEATURES
from pipeline.export.inputs import Input


@dataclasses.dataclass(frozen=True, eq=False)
class Preparation:
    """Tokens that several spaces share; equal to itself alone.

    one: the input that makes them. spaces: (name, its input) of each space.
    """

    one: Input
    spaces: tuple[tuple[str, Input], ...]


def spaces_of(encoder: Encoder, *, features: bool) -> dict[str, int]:
    """Space → size of its vectors. Raises RequestError if there is none.

    features: add the pooled features before any head, as the space ``FEATURES``.
    """
    found = dict.fromkeys(encoder.spaces, encoder.config.model.common_dim)
    if features:
        found[FEATURES] = encoder.config.model.width
    if not found:
        raise RequestError(
            "--run: expected a model with a common space, found classifiers alone; --features embeds by the pooled "
            "features before any head"
        )
    return found


def modalities_of(encoder: Encoder, spaces: Sequence[str]) -> tuple[str, ...]:
    """The modalities that lead to one of the spaces, texts last."""
    found = dict.fromkeys(one.modality for one in _usable(encoder) if one.space in spaces or FEATURES in spaces)
    return tuple(sorted(found, key=lambda name: name == TEXT))


def preparations(encoder: Encoder, modality: str, data_sets: Sequence[str], spaces: Sequence[str]) -> list[Preparation]:
    """How an item of a modality is prepared for each space that has it.

    data_sets: whose preparation, the first that has the modality. Raises RequestError if data sets prepare it in
    different ways and none of them is named.
    """
    found: dict[str, list[tuple[str, Input]]] = {}
    for space in spaces:
        if one := _choose(encoder, modality, data_sets, space):
            found.setdefault(one.preparation, []).append((space, one))
    return [Preparation(pairs[0][1], tuple(pairs)) for pairs in found.values()]


def query_input(encoder: Encoder, modality: str, space: str, *, data_set: str, beside: str) -> Input | None:
    """How a query is prepared that is compared with items of a data set; None if the space has no such modality.

    beside: the items' modality. As the data set itself prepares it, or else the largest input.
    """
    fitting = [one for one in _usable(encoder) if one.modality == modality and one.space == space]
    fitting = [one for one in fitting if beside in one.beside] or fitting
    own = [one for one in fitting if one.data_set == data_set]
    return max(own or fitting, key=_size, default=None)


def _choose(encoder: Encoder, modality: str, data_sets: Sequence[str], space: str) -> Input | None:
    fitting = [one for one in _usable(encoder) if one.modality == modality and space in (FEATURES, one.space)]
    named = next(([o for o in fitting if o.data_set == name] for name in data_sets if _has(fitting, name)), None)
    if named is None and modality != TEXT and len({one.preparation for one in fitting}) > 1:
        names = some_of(dict.fromkeys(one.data_set for one in fitting))
        raise RequestError(
            f"--data-set: the model's data sets prepare {modality} in different ways: name the one that is like "
            f"the input: {names}"
        )
    return max(named or fitting, key=_size, default=None)


def _has(inputs: list[Input], data_set: str) -> bool:
    return any(one.data_set == data_set for one in inputs)


def _usable(encoder: Encoder) -> tuple[Input, ...]:
    """The inputs, those of texts only where the tokenizer can be used."""
    return tuple(one for one in encoder.config.inputs if one.modality != TEXT or encoder.tokenizer is not None)


def _size(one: Input) -> tuple[int, int]:
    """The largest variant comes first, as evaluation has it."""
    return max((math.prod(v.grid) for v in one.variants), default=0), one.text_length
