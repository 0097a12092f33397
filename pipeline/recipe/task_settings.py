"""The keys of what is trained on and measured: texts, data sets, tasks, evaluations."""

from __future__ import annotations

import collections
import math
from typing import Annotated, Any, Literal

import pydantic
import pydantic_core

from model import terms
from pipeline.data.modalities import TEXT
from pipeline.data.prompts import has_a_place
from pipeline.data.spec import AudioSettings, Augment, ImageSpec, VideoSpec
from pipeline.recipe.section import Section, Share, Weight, key


class TextSettings(Section):
    """The tokenizer of all texts."""

    tokenizer: str | None = key(
        None, "A sentencepiece model or a Hugging Face tokenizer.json; null trains one on the data sets' own text."
    )
    vocab_size: int = key(1000, "Pieces of a tokenizer that is trained.", ge=16)
    max_characters: int = key(
        100_000,
        "Maximum characters of a text; longer ones are left out, and tasks cut the others at text_length tokens.",
        ge=1,
        le=1_000_000,
    )


class PlanSettings(Section):
    """Sizes of the data set for a plan of the run, which needs no data."""

    rows: int | None = key(None, "Rows of the training manifest, for samplers that go by them.", ge=1)
    classes: int | None = key(None, "Number of classes, in place of the list.", ge=2)


class DataSetSettings(Section):
    """One data set: its manifests and how their media are decoded."""

    manifest: str = key(..., "Parquet file, folder or URI whose rows name the media; demo: paths are the demo corpus'.")
    held_out: str | dict[str, str] = key({}, "Manifest of rows to evaluate on, or several by name.")
    shards: str | None = key(None, "Folder of preprocessed shards to read in place of the media.")
    classes: list[str] | str = key([], "Class names in order, or a file with one on each line.")
    image: ImageSpec = ImageSpec()
    video: VideoSpec = VideoSpec()
    audio: AudioSettings = AudioSettings()
    max_reject_fraction: Share | None = key(
        None, "Maximum share of rejects among this data set's samples; null: the recipe's max_reject_fraction."
    )
    schemes: list[Annotated[str, pydantic.Field(pattern=r"^[A-Za-z][A-Za-z0-9+.-]*$")]] = key(
        [],
        "Schemes of media URIs to allow beside file, gs, hf, http, https, s3 and the manifest's own; rows with others "
        "are rejects.",
    )
    plan: PlanSettings = PlanSettings()
    media: dict[str, dict[str, Any]] = key(
        {}, "Settings of modalities that the recipe adds, by name, such as {depth: {short_side: 64}}."
    )


class VariantSettings(Section):
    """One input size of a task; its batch follows from the first variant's vision tokens, up to 5 % below them."""

    size: int = key(..., "Pixels of each side of the square view; a multiple of the model's patch.", ge=1)
    frames: int | None = key(None, "Frames of a video view; null: 16.", ge=1)
    drop_rate: float = key(0.0, "Share of vision tokens that training drops (DropToken).", ge=0, lt=1)


_Objective = Literal[terms.NAMES]  # pyrefly: ignore[invalid-literal]


class TaskSettings(Section):
    """One task: a data set, an objective and the model's view of a row."""

    data_set: str = key(..., "Name of the data set that the task reads.")
    objective: _Objective | dict[_Objective, Annotated[float, pydantic.Field(gt=0)]] = key(
        ...,
        'Loss: "nce" and "sigmoid_pairs" compare modalities, "softmax" and "sigmoid" (several labels a row) classify '
        "the first modality that is not text; {nce: 1.0, softmax: 0.5} is the weighted sum over one batch.",
    )
    modalities: list[str] = key(..., "Modalities of the task: one to classify, two or three to compare.", min_length=1)
    batch_size: int = key(..., "Samples of a step on all devices together, at the first variant.", ge=1)
    weight: float | None = key(None, "Weight in the sampler; null: the data set's number of examples.", ge=0)
    variants: list[VariantSettings] = key([], "Input sizes between which the task's batches alternate.")
    classes: list[str] = key([], "The part of the data set's classes that counts; [] is all.")
    text: Literal["captions", "labels"] = key(
        "captions", "Texts are the rows' captions, or prompts filled with the rows' labels."
    )
    text_length: int = key(64, "Tokens at which texts are cut.", ge=1)
    positives: Literal["labels", "text", "instance"] | None = key(
        None, 'Rows of equal "labels" or "text" are positives of each other, of "instance" none; null follows the text.'
    )
    augment: Augment = Augment()
    pair_weights: dict[str, Weight] = key(
        {}, "Weights of audio_text, audio_vision and text_vision where they are not 1; 0 leaves a pair out."
    )
    microbatches: int = key(
        1, "Parts in which a batch is worked through for one update, to save memory; for classification alone.", ge=1
    )

    @pydantic.field_validator("objective", mode="before")
    @classmethod
    def _known_terms(cls, given: Any) -> Any:
        weights = given if isinstance(given, dict) else {str(given): 1.0}
        known = all(name in terms.NAMES and _positive(weight) for name, weight in weights.items())
        if not weights or not known:
            names = ", ".join(terms.NAMES)
            raise pydantic_core.PydanticCustomError(
                "objective", f"expected one of {names}, or a mapping of some of them to weights above 0"
            )
        return given

    @property
    def objectives(self) -> tuple[tuple[str, float], ...]:
        """(name, weight) of every term, in the order of ``terms.NAMES``."""
        weights = self.objective if isinstance(self.objective, dict) else {self.objective: 1.0}
        return tuple((name, weights[name]) for name in terms.NAMES if name in weights)


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


class EvaluationSettings(Section):
    """One measurement of held-out rows: those of a data set, or of any manifest."""

    data_set: str | None = key(
        None,
        "Data set whose held-out rows are measured, and whose classes and decoding apply; null, with a manifest: the "
        "decoding that the model was trained with, if there is only one.",
    )
    kind: Literal["zero_shot", "classify", "retrieval", "linear_probe", "knn"] = key(
        ...,
        '"classify" uses the classifier, "zero_shot" prompts, "retrieval" compares two modalities both ways; '
        '"linear_probe" (logistic regression) and "knn" learn from labelled rows on the frozen pooled features.',
    )
    modality: str = key(..., "Modality of the rows that is measured.")
    other: str = key("text", "Modality with which retrieval compares it.")
    manifest: str | None = key(None, "Manifest to measure, whether or not a task trained on it; null: held_out's.")
    held_out: str | None = key(None, "Name of one of several held-out manifests; null: the first.")
    classes: list[str] | str = key(
        [],
        "Classes to tell apart, or a file with one on each line; [] is the data set's, or every label of the manifest.",
    )
    prompts: list[str] | str = key(
        [], "Prompts of zero_shot, with {} where the class goes, or a file of them; [] is the built-in ones."
    )
    positives: Literal["labels", "text", "instance"] | None = key(
        None, "Rows that count as right in retrieval, as a task's \"positives\"; null: as the pair's task counts them."
    )
    name: str | None = key(None, "Name of the measurement in the results; null: the modality, or both.")
    clips: int = key(
        1,
        "Windows of a row whose results are averaged, evenly spaced; 1 is the middle of a video and the start of a "
        "sound.",
        ge=1,
    )
    sizes: list[Annotated[int, pydantic.Field(ge=1)]] = key(
        [], "Pixels of the square views, a result for each; [] is the largest that was trained."
    )
    frames: int | None = key(None, "Frames of a video view; null: those that were trained.", ge=1)
    max_rows: int | None = key(None, "Maximum number of rows, always the same sample of them; null: all.", ge=1)
    fit: str | None = key(
        None, "Manifest that linear_probe, knn and the baseline learn from; null: the data set's training rows."
    )
    max_fit_rows: int = key(10_000, "Maximum number of rows to learn from, always the same sample of them.", ge=2)
    baseline: bool = key(
        False, "Beside it, the nearest neighbour in pixels or spectrograms, without learning; for rows with labels."
    )
    resamples: int = key(
        1000, "Resamples of the rows from which intervals are made (bootstrap); 0: no intervals.", ge=0
    )

    @pydantic.field_validator("clips")
    @classmethod
    def _of_what_lasts(cls, clips: int, info: pydantic.ValidationInfo) -> int:
        if clips > 1 and {info.data.get("modality"), info.data.get("other")} <= {"image", TEXT}:
            raise pydantic_core.PydanticCustomError("clips", "expected 1, an image has one view")
        return clips

    @pydantic.field_validator("prompts")
    @classmethod
    def _with_a_place_for_the_class(cls, prompts: list[str]) -> list[str]:
        if not all(map(has_a_place, prompts)):
            raise pydantic_core.PydanticCustomError("prompts", "expected {} where the class goes in every prompt")
        return prompts

    @pydantic.field_validator("classes")
    @classmethod
    def _different_and_not_empty(cls, classes: list[str]) -> list[str]:
        if any(not name.strip() for name in classes):
            raise pydantic_core.PydanticCustomError("classes", "expected a text for every class, found an empty one")
        twice = [name for name, count in collections.Counter(classes).items() if count > 1]
        if twice:
            raise pydantic_core.PydanticCustomError("classes", f"expected different ones, {twice[0]!r} appears again")
        return classes
