"""How the inputs of an exported model are prepared, as plain data that go into its config.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from pipeline.data.modalities import MODALITIES, TEXT
from pipeline.data.spec import AudioSpec, ImageSpec, Variant, VideoSpec

# Settings of the modalities that every recipe has.
SETTINGS = {"image": ImageSpec, "video": VideoSpec, "audio": AudioSpec}


@dataclasses.dataclass(frozen=True)
class Input:
    """One modality of a data set, as a head of the model takes it.

    embedder: the model's name for the modality's layers. settings: of its decoding and tokens; None for text, values by
    name for a modality that the recipe added. clip_s: seconds of the data set's canonical video clip.
    variants: sizes that were trained, the one that evaluation uses first. text_length: tokens of a text.
    pair: the modalities of the model whose common space this leads to, two with heads per pair; () for a classifier.
    beside: the media that a text was trained with. objective, classes: of a classifier, the trained columns alone.
    """

    data_set: str
    modality: str
    embedder: str
    settings: Any = None
    clip_s: float = 0.0
    variants: tuple[Variant, ...] = ()
    text_length: int = 0
    pair: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    objective: str = ""
    classes: tuple[str, ...] = ()

    @property
    def space(self) -> str:
        """The name of the common space; "" for a classifier."""
        return "_".join(self.pair)

    @property
    def preparation(self) -> str:
        """What the tokens follow from, as text. Two inputs with equal ones give equal tokens."""
        return repr((self.modality, self.settings, self.clip_s, self.variants[:1], self.text_length))


def settings_type(modality: str) -> type | None:
    """The type of ``Input.settings``: None for text, dict for an added modality."""
    return None if modality == TEXT else SETTINGS.get(modality, dict)


def trained_variants(variants: Iterable[Variant]) -> tuple[Variant, ...]:
    """The different sizes among variants, nothing dropped, the largest first: evaluation uses that one."""
    ordered = sorted(variants, key=lambda v: (-math.prod(v.grid), v.drop_rate))
    return tuple(dict.fromkeys(_whole(v) for v in ordered))


def _whole(variant: Variant) -> Variant:
    """A variant's size alone, without what concerns training."""
    name, tokens = variant.name.split("-")[0], math.prod(variant.grid)
    return dataclasses.replace(variant, name=name, drop_rate=0.0, global_batch_size=1, num_vision_tokens=tokens)


def is_built_in(modality: str) -> bool:
    """Whether a modality needs no code beside the project's own."""
    return modality == TEXT or modality in MODALITIES
