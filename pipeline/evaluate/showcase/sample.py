"""A part of a held-out set with its features and small pictures."""

from __future__ import annotations

import dataclasses

import numpy as np

from pipeline.data.captions import usable_captions
from pipeline.data.media.clip import Clip
from pipeline.data.media.errors import Reject
from pipeline.data.sample_tokens import View, evaluation_tokens
from pipeline.data.sources import MediaSource
from pipeline.data.spec import AudioSpec, DataSetSpec, TaskSpec, Variant
from pipeline.data.thumbnails import image_uri, spectrogram_uri, strip_uri
from pipeline.evaluate.inputs import variants_of
from pipeline.evaluate.trained_model import TrainedModel
from pipeline.export.features import pooled
from pipeline.recipe import specs

# Maximum number of rows, and how many of them may fail before the rest is left alone.
_MAX_ROWS = 128
# Longer side of a picture within a map, in pixels.
_SPOT = 32


@dataclasses.dataclass
class Sample:
    """Rows of a held-out set whose media could all be read.

    variants: modality → the size that is shown. tokens: modality → those of the first row. features: modality → (rows,
    width). pictures, spots: modality → a data URI for each row, empty where there is nothing to see.
    """

    data_set: DataSetSpec
    tasks: list[TaskSpec]
    variants: dict[str, Variant]
    labels: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    texts: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    tokens: dict[str, dict] = dataclasses.field(default_factory=dict)
    features: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    pictures: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    spots: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    @property
    def rows(self) -> int:
        return len(self.labels)

    def truth(self, row: int) -> str:
        """A row in words: its first caption, or its labels."""
        return self.texts[row][0] if self.texts[row] else ", ".join(self.labels[row])

    def embedder(self, modality: str) -> str:
        """The model's name for the layers of a modality."""
        return next(t for t in self.tasks if modality in t.modalities).embedder(modality)

    def is_film(self, modality: str) -> bool:
        """Whether its pictures are strips or spectrograms: wide ones."""
        return self.variants[modality].num_frames > 0 or isinstance(self.data_set.settings(modality), AudioSpec)


def take_sample(model: TrainedModel, data_set: DataSetSpec, tasks: list[TaskSpec]) -> Sample:
    """Rows of the data set's first held-out manifest, evenly spread; of no rows if its tasks look at no media."""
    found = {m: _variant(tasks, data_set, m) for m in data_set.media}
    sample = Sample(data_set, tasks, {m: variant for m, variant in found.items() if variant is not None})
    if not sample.variants:
        return sample
    manifest, limits = next(iter(data_set.held_out.values())), specs.decode_limits(model.recipe)
    source = MediaSource(data_set, modalities=tuple(sample.variants), manifest=manifest, limits=limits)
    rows = np.unique(np.linspace(0, source.num_rows - 1, min(_MAX_ROWS, source.num_rows)).astype(int))
    tokens: dict[str, list[dict]] = {m: [] for m in sample.variants}
    for row in rows.tolist():
        try:
            clip = source.clip(row)
            made = {m: _tokens(model, sample, m, clip) for m in sample.variants}
        except Reject:
            continue
        _keep(model, sample, clip)
        for modality, values in made.items():
            tokens[modality].append(values)
    for modality, samples in tokens.items():
        if samples:
            sample.tokens[modality] = samples[0]
            sample.features[modality] = pooled(model, sample.embedder(modality), iter(samples))
    return sample


def _variant(tasks: list[TaskSpec], data_set: DataSetSpec, modality: str) -> Variant | None:
    """The largest size that a modality was trained on; None if no loss looks at it."""
    for classified in (False, True):
        if found := variants_of(tasks, data_set=data_set.name, modality=modality, classified=classified):
            return found[0]
    return None


def _tokens(model: TrainedModel, sample: Sample, modality: str, clip: Clip) -> dict:
    data_set, view = sample.data_set, View(sample.variants[modality])
    settings = data_set.settings(modality)
    return evaluation_tokens(clip.media[modality], data_set.modality(modality), settings, view, model.tokens)


def _keep(model: TrainedModel, sample: Sample, clip: Clip) -> None:
    """The words and the pictures of a row."""
    limit, tokenizer = max(t.max_characters for t in sample.tasks), model.tokenizer
    sample.labels.append(clip.labels)
    sample.texts.append(usable_captions(clip.text, tokenizer, max_characters=limit) if tokenizer else ())
    for modality in sample.variants:
        picture, spot = pictures_of(clip.media[modality], sample.data_set.settings(modality))
        sample.pictures.setdefault(modality, []).append(picture)
        sample.spots.setdefault(modality, []).append(spot)


def pictures_of(array: np.ndarray, settings: object) -> tuple[str, str]:
    """(a picture of a card, one of a map) of decoded media; empty for what is no picture."""
    if isinstance(settings, AudioSpec):
        return spectrogram_uri(array, settings), ""
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.shape[-1] != 3:
        return "", ""
    if array.ndim == 4:
        return strip_uri(array), image_uri(array[len(array) // 2], side=_SPOT)
    return image_uri(array), image_uri(array, side=_SPOT)
