"""The one door to an exported model: embeddings, classes and similarities of files, pictures, arrays and texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.data.media.errors import Reject
from pipeline.data.modalities import TEXT, Modality, embedder_name
from pipeline.data.modalities import load as load_object
from pipeline.data.prompts import eval_templates
from pipeline.data.sample_tokens import View, evaluation_tokens
from pipeline.data.spec import TokenSpec
from pipeline.data.tokenizer import encode_text
from pipeline.errors import RequestError, some_of
from pipeline.export import choices, requests
from pipeline.export.choices import FEATURES, Options
from pipeline.export.features import Features, class_anchors, mean_over_clips, pooled, unit
from pipeline.export.inputs import Input, is_built_in
from pipeline.export.media import Rates, canonical

# Argument → modality.
ARGUMENTS = {"images": "image", "videos": "video", "audio": "audio", "texts": TEXT}


class Encoder:
    """An exported model. Inputs are lists of any length, or one item that counts as a list of one.

    What an item may be: ``pipeline.export.media``. Every value is the same to the bit in any order and company, and
    equal to what ``imp evaluate`` computes on the same kind of CPU. Wrong requests and bad items raise RequestError.
    """

    def __init__(self, model: Features, config: Any, tokenizer: Any, modalities: Mapping[str, Modality]) -> None:
        self.model, self.config = model, config
        self.tokenizer, self._modalities = tokenizer, modalities
        sizes = {field.name: getattr(config.model, field.name) for field in dataclasses.fields(TokenSpec)}
        self._sizes = TokenSpec(**sizes)

    @property
    def spaces(self) -> tuple[str, ...]:
        """Names of the common spaces that the run trained, such as "text_vision"."""
        return tuple(dict.fromkeys(one.space for one in self.config.inputs if one.pair))

    def embed(
        self,
        *,
        images: Any = None,
        videos: Any = None,
        audio: Any = None,
        texts: Any = None,
        media: Mapping[str, Any] | None = None,
        space: str | None = None,
        dim: int | None = None,
        data_set: str | None = None,
        size: int | None = None,
        frames: int | None = None,
        clips: int = 1,
        fps: float | None = None,
        sample_rate: float | None = None,
    ) -> dict[str, np.ndarray]:
        """Argument → (n, K) float32 of unit length in a common space, where nearness is the dot product.

        media: items of modalities that the recipe added, by name. space: one of ``spaces``, or "features" for the
        pooled features (n, width) before any head; needed where several spaces fit. dim: K, where fewer leading
        dimensions were trained to be of use alone (``model.matryoshka``); by default all. data_set: the data set whose
        preparation is used, needed where several differ. size, frames: of another variant that was trained than the
        largest. clips: windows of a video or sound, evenly spaced, whose embeddings are averaged. fps, sample_rate: of
        videos and sounds that are arrays.
        """
        given = requests.given(images=images, videos=videos, audio=audio, texts=texts, **(media or {}))
        options, rates = Options(space, data_set, size, frames, clips, dim), Rates(fps, sample_rate)
        dim = choices.choose_dim(self.config.model, options)
        names = [ARGUMENTS.get(argument, argument) for argument in given]
        space = choices.choose_space(self.config.inputs, names, options)
        out = {}
        for (argument, items), name in zip(given.items(), names, strict=True):
            one = choices.choose_input(self.config.inputs, name, space, options, beside=names)
            features = self._features(argument, items, choices.choose_variant(one, options), options, rates)
            out[argument] = self._embedded(features, one, space, dim)
        return out

    def similarity(self, **arguments: Any) -> np.ndarray:
        """(n, m) cosines of two kinds of input, from -1 to 1; the rows are the argument that is named first.

        arguments: as of ``embed``, two of them inputs.
        """
        found = self.embed(**arguments)
        if len(found) != 2 or arguments.get("space") == FEATURES:
            raise RequestError(f"similarity: expected two kinds of input in a common space, found {some_of(found)}")
        order = [*arguments, *(arguments.get("media") or {})]
        rows, columns = (found[name] for name in sorted(found, key=order.index))
        return rows @ columns.T

    def classify(
        self,
        *,
        images: Any = None,
        videos: Any = None,
        audio: Any = None,
        media: Mapping[str, Any] | None = None,
        data_set: str | None = None,
        classes: Sequence[str] | None = None,
        size: int | None = None,
        frames: int | None = None,
        clips: int = 1,
        fps: float | None = None,
        sample_rate: float | None = None,
    ) -> list[dict[str, float]]:
        """Class name → probability of each item by a trained classifier, the likeliest first.

        data_set: whose classifier, needed where several were trained. classes: the ones to choose between, by default
        those that were trained. A classifier trained with sigmoid gives each class a probability of its own. The rest
        as in ``embed``.
        """
        argument, items = requests.only(requests.given(images=images, videos=videos, audio=audio, **(media or {})))
        options, rates = Options(None, data_set, size, frames, clips), Rates(fps, sample_rate)
        name = ARGUMENTS.get(argument, argument)
        one = choices.choose_classifier(self.config.inputs, name, options)
        columns = {name: column for column, name in enumerate(self.config.classifiers[one.data_set])}
        wanted = requests.class_names(one.classes if classes is None else classes)
        if not columns.keys() >= set(wanted):
            raise RequestError(f"classes: expected some of {some_of(columns)}, found {some_of(wanted)}")
        features = self._features(argument, items, choices.choose_variant(one, options), options, rates)
        if not items:
            return []
        logits = mean_over_clips(lambda x: self.model.logits(x, one.data_set), features)
        return requests.named(logits[:, [columns[c] for c in wanted]], wanted, one.objective)

    def zero_shot(
        self,
        *,
        classes: Sequence[str],
        images: Any = None,
        videos: Any = None,
        audio: Any = None,
        media: Mapping[str, Any] | None = None,
        prompts: Sequence[str] | None = None,
        dim: int | None = None,
        data_set: str | None = None,
        size: int | None = None,
        frames: int | None = None,
        clips: int = 1,
        fps: float | None = None,
        sample_rate: float | None = None,
    ) -> list[dict[str, float]]:
        """Class name → probability of each item by the nearest text, for classes of any name, the likeliest first.

        prompts: sentences with {} in place of the class, whose embeddings are averaged; by default those of evaluation.
        Probabilities are by the temperature that the space was trained with. The rest as in ``embed``.
        """
        argument, items = requests.only(requests.given(images=images, videos=videos, audio=audio, **(media or {})))
        options, rates = Options(None, data_set, size, frames, clips, dim), Rates(fps, sample_rate)
        dim = choices.choose_dim(self.config.model, options)
        name, classes = ARGUMENTS.get(argument, argument), requests.class_names(classes)
        space = choices.choose_space(self.config.inputs, [name, TEXT], options)
        one = choices.choose_input(self.config.inputs, name, space, options)
        of_text = choices.choose_input(self.config.inputs, TEXT, space, options, beside=[name])
        sentences = requests.sentences(prompts, self.config.prompts.get(name) or eval_templates(name))
        texts = [sentence.format(c) for c in classes for sentence in sentences]
        projected = self._projected(self._features("classes", texts, of_text, Options(), rates), of_text, dim)
        anchors = class_anchors(projected, len(sentences))
        features = self._features(argument, items, choices.choose_variant(one, options), options, rates)
        if not items:
            return []
        cosines = mean_over_clips(lambda x: unit(self._project(x, one, dim)) @ anchors.T, features)
        temperature = self.model.temperature(one.embedder, of_text.embedder)
        return requests.named(cosines / temperature, classes, "softmax")

    # --- from items to features ---

    def _features(self, argument: str, items: list, one: Input, options: Options, rates: Rates) -> np.ndarray:
        """(n, clips, width) float32."""
        clips = 1 if one.modality == TEXT else options.clips
        if one.modality == TEXT:
            samples = self._texts(argument, items, one)
        else:
            samples = self._views(argument, items, one, clips, rates)
        return pooled(self.model, one.embedder, samples).reshape(len(items), clips, self.config.model.width)

    def _texts(self, argument: str, items: list, one: Input) -> Iterator[dict]:
        if self.tokenizer is None:
            raise RequestError(
                "texts: expected a tokenizer and its package (sentencepiece or tokenizers), found none: install it, "
                "or use a model that was trained on texts"
            )
        for number, text in enumerate(items):
            if not isinstance(text, str):
                raise RequestError(f"{argument}[{number}]: expected a str, found {type(text).__name__}")
            try:
                yield self.text_sample(text, one)
            except Reject as e:
                raise RequestError(f"{argument}[{number}]: {e}") from e

    def _views(self, argument: str, items: list, one: Input, clips: int, rates: Rates) -> Iterator[dict]:
        modality, settings = self.modality(one)
        for number, item in enumerate(items):
            try:
                clip = canonical(item, one.modality, modality, settings, clip_s=one.clip_s, rates=rates)
                yield from self.media_samples(clip, one, clips)
            except (Reject, RequestError) as e:
                raise RequestError(f"{argument}[{number}]: {e}") from e
            except ModuleNotFoundError as e:
                raise RequestError(f"{argument}: expected the package {e.name}: pip install {e.name}") from e

    # --- the parts, for jobs that decode and batch by themselves ---

    def text_sample(self, text: str, one: Input) -> dict[str, np.ndarray]:
        """The tokens of one text, as ``Features.features`` takes them. Raises Reject for a text without any."""
        arrays = encode_text(self.tokenizer, text, one.text_length)
        return {name.partition("/")[2]: array for name, array in arrays.items()}

    def media_samples(self, clip: np.ndarray, one: Input, clips: int = 1) -> Iterator[dict[str, np.ndarray]]:
        """The tokens of every window of a canonical clip, as ``Features.features`` takes them."""
        modality, settings = self.modality(one)
        for window in range(clips):
            view = View(one.variants[0], window=(window, clips))
            yield evaluation_tokens(clip, modality, settings, view, self._sizes)

    def vectors(self, features: np.ndarray, one: Input) -> np.ndarray:
        """(n, K) float32 of unit length in the space of an input, of (n, clips, width) pooled features."""
        return unit(self._projected(features, one))

    def modality(self, one: Input) -> tuple[Modality, Any]:
        """The modality of an input, and its settings."""
        modality = self._modalities.get(one.modality)
        if modality is None:
            known = f'load(..., modalities={{"{one.modality}": ...}})'
            raise RequestError(f"{one.modality}: the recipe added this modality: give its description to {known}")
        if is_built_in(one.modality):
            return modality, one.settings
        if embedder_name(one.modality, modality) != one.embedder:
            raise RequestError(f"{one.modality}: expected a modality with the embedder {one.embedder}")
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in one.settings.items()}
        return modality, load_object(modality.settings)(**values)

    # --- from features to results ---

    def _project(self, features: np.ndarray, one: Input, dim: int | None = None) -> np.ndarray:
        target = next(m for m in one.pair if m != one.embedder)
        model = self.model if dim is None else self.model.at_dim(dim)
        return model.project(features, source=one.embedder, target=target)

    def _projected(self, features: np.ndarray, one: Input, dim: int | None = None) -> np.ndarray:
        return mean_over_clips(lambda x: self._project(x, one, dim), features)

    def _embedded(self, features: np.ndarray, one: Input, space: str, dim: int) -> np.ndarray:
        if space == FEATURES:
            return features.mean(1)
        if not len(features):
            return np.zeros((0, dim), np.float32)
        return unit(self._projected(features, one, dim))
