"""Which of a model's inputs and heads a request means: the only one that fits, or the one it names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from model.config import ModelConfig
from pipeline.errors import RequestError, some_of
from pipeline.export.inputs import Input

# The name for pooled features, before any head.
FEATURES = "features"


@dataclasses.dataclass(frozen=True)
class Options:
    """What a request may name. data_set: whose preparation, or whose classifier. size, frames: of another variant that
    was trained. clips: windows of a video or sound, evenly spaced, over which results are averaged. dim: leading
    dimensions of a common space."""

    space: str | None = None
    data_set: str | None = None
    size: int | None = None
    frames: int | None = None
    clips: int = 1
    dim: int | None = None

    def __post_init__(self) -> None:
        if type(self.clips) is not int or self.clips < 1:
            raise RequestError(f"clips: expected a number of at least 1, found {self.clips!r}")


def choose_space(inputs: Sequence[Input], modalities: Sequence[str], options: Options) -> str:
    """The one common space of all the modalities. Raises RequestError, with the list, where there is not just one."""
    fitting = [{one.space for one in inputs if one.modality == m and one.pair} for m in modalities]
    known = sorted(set.intersection(*fitting)) if fitting else []
    asked, what = options.space, " and ".join(modalities)
    if asked == FEATURES or asked in known:
        return asked
    every = f"{FEATURES!r} gives the model's features before any head"
    listed = f"space= one of {', '.join(known)}; {every}" if known else every
    if asked is not None:
        raise RequestError(f"space: {asked!r} is none of {what}: {listed}")
    if len(known) != 1:
        raise RequestError(f"{what}: {'several spaces fit' if known else 'no space was trained'}: {listed}")
    return known[0]


def choose_input(
    inputs: Iterable[Input], modality: str, space: str, options: Options, *, beside: Sequence[str] = ()
) -> Input:
    """How a modality is prepared for a space. Raises RequestError where data sets prepare it in different ways.

    beside: the other modalities of the request, with which a text was trained.
    """
    of_modality = [one for one in inputs if one.modality == modality]
    if not of_modality:
        known = sorted({one.modality for one in inputs})
        raise RequestError(f"{modality}: the model was trained on {', '.join(known) or 'inputs that it does not name'}")
    fitting = [one for one in of_modality if space in (FEATURES, one.space)]
    fitting = [one for one in fitting if set(beside) & set(one.beside)] or fitting
    fitting = _of_data_set(fitting, modality, options.data_set)
    if space == FEATURES and len({one.data_set for one in fitting}) == 1:
        # Several heads of one data set: the largest input, as evaluation chooses it.
        return max(fitting, key=lambda one: (_largest(one), one.text_length))
    if len({one.preparation for one in fitting}) > 1:
        names = some_of(dict.fromkeys(one.data_set for one in fitting))
        raise RequestError(f"{modality}: data sets prepared it in different ways: data_set= one of {names}")
    return fitting[0]


def choose_dim(model: ModelConfig, options: Options) -> int:
    """The leading dimensions of a common space. Raises RequestError for a number that was not trained."""
    known = model.matryoshka or (model.common_dim,)
    if options.dim is None:
        return known[-1]
    if options.dim not in known or options.space == FEATURES:
        where = f"of a common space, not of {FEATURES!r}" if options.space == FEATURES else "that was trained"
        raise RequestError(f"dim: expected one {where}: {', '.join(map(str, known))}; found {options.dim!r}")
    return options.dim


def choose_classifier(inputs: Iterable[Input], modality: str, options: Options) -> Input:
    """The classifier of a modality. Raises RequestError, with the list, where there is not just one."""
    trained = [one for one in inputs if one.modality == modality and one.classes]
    if not trained:
        raise RequestError(f"{modality}: no classifier was trained on it; zero_shot takes classes of any name")
    fitting = _of_data_set(trained, modality, options.data_set)
    if len({one.data_set for one in fitting}) > 1:
        names = some_of(one.data_set for one in fitting)
        raise RequestError(f"{modality}: several classifiers fit: data_set= one of {names}")
    return fitting[0]


def choose_variant(one: Input, options: Options) -> Input:
    """The input with the variant that was asked for first. Raises RequestError if it was not trained."""
    sized = [v for v in one.variants if v.size]
    if not sized:  # sizes of pictures do not concern texts and sounds
        return one
    fitting = [v for v in sized if options.size in (None, v.size) and options.frames in (None, v.num_frames)]
    if not fitting:
        names = ", ".join(v.name for v in sized)
        asked = " and ".join(f"{n}={v}" for n, v in (("size", options.size), ("frames", options.frames)) if v)
        raise RequestError(f"{one.modality}: {asked} was not trained; known: {names}")
    return dataclasses.replace(one, variants=tuple(fitting))


def _of_data_set(inputs: list[Input], modality: str, data_set: str | None) -> list[Input]:
    fitting = [one for one in inputs if data_set in (None, one.data_set)]
    if not fitting:
        names = some_of(dict.fromkeys(one.data_set for one in inputs))
        raise RequestError(f"{modality}: data_set {data_set!r} has no such head; known: {names}")
    return fitting


def _largest(one: Input) -> int:
    return max((v.num_vision_tokens for v in one.variants), default=0)
