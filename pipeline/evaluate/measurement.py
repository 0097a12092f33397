"""From the settings of a measurement to its parts: rows, preparation, heads, classes, texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from pipeline.credentials import redacted
from pipeline.data.modalities import TEXT
from pipeline.data.spec import DataSetSpec, TaskSpec, Variant
from pipeline.data.variants import make_variant
from pipeline.errors import RequestError
from pipeline.evaluate.held_out import Side
from pipeline.evaluate.inputs import variants_of
from pipeline.evaluate.trained_model import EvaluatedModel
from pipeline.export.inputs import trained_variants
from pipeline.recipe import EvaluationSettings, specs
from pipeline.recipe.measurable import classifies, comparing, other_of, pair_of

# Frames of a video view where no task trained one.
_FRAMES = 16


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One measurement of one input size, all of it decided.

    manifest: of the rows. sides: the media whose features are needed, the measured one first. task: the one that
    trained the head, whose texts and positives count; None for features alone. label: the rows' name in the results.
    """

    settings: EvaluationSettings
    label: str
    manifest: str
    sides: tuple[Side, ...]
    task: TaskSpec | None

    @property
    def side(self) -> Side:
        """The measured one."""
        return self.sides[0]

    @property
    def name(self) -> str:
        """The name of the measurement in the results."""
        s = self.settings
        names = s.modality if s.kind != "retrieval" or s.other == TEXT else f"{s.modality}_{s.other}"
        return f"{s.kind}_{s.name or names}"

    @property
    def positives(self) -> str:
        """The rows that count as right in retrieval."""
        return self.settings.positives or (self.task.positives if self.task else "instance")

    @property
    def fit_manifest(self) -> str:
        """The rows to learn from. Raises RequestError if the data set is not named and no manifest is."""
        if self.settings.fit is None and self.settings.data_set is None:
            raise RequestError(
                f"{self.settings.kind}: expected fit, a manifest of labelled rows to learn from, or data_set"
            )
        return self.side.data_set.manifest if self.settings.fit is None else specs.locate(self.settings.fit)


def measurements(model: EvaluatedModel, settings: EvaluationSettings) -> list[Measurement]:
    """The measurements that an entry stands for, one a size. Raises RequestError for one that cannot be made."""
    return [_measurement(model, settings, size) for size in settings.sizes or [None]]


def _measurement(model: EvaluatedModel, settings: EvaluationSettings, size: int | None) -> Measurement:
    task = head_task(model, settings)
    data_set = _data_set(model, settings, task)
    names = [settings.modality]
    if other_of(settings) != TEXT:
        names.append(other_of(settings))
    sides = tuple(_side(model, settings, name, data_set, size) for name in names)
    manifest, label = _rows(settings, data_set)
    return Measurement(settings, label, manifest, sides, task)


def _rows(settings: EvaluationSettings, data_set: DataSetSpec) -> tuple[str, str]:
    """(the manifest, its name in the results)."""
    if settings.manifest is not None:
        manifest = specs.locate(settings.manifest)
        # The name is shown and names files: a URI's query may hold credentials.
        path = redacted(manifest).partition("?")[0].rstrip("/")
        return manifest, path.rpartition("/")[2].removesuffix(".parquet")
    held_out = data_set.held_out
    name = settings.held_out or next(iter(held_out))
    return held_out[name], data_set.name if len(held_out) == 1 else f"{data_set.name}/{name}"


def head_task(model: EvaluatedModel, settings: EvaluationSettings) -> TaskSpec | None:
    """The task that trained the head, one on the measurement's data set first; None for features alone."""
    pair = pair_of(settings, model.embedders)
    embedder = model.embedders[settings.modality]

    def fits(task: TaskSpec) -> bool:
        is_classifier = settings.kind == "classify" and classifies(task, embedder)
        return is_classifier and settings.data_set in (None, task.data_set)

    fitting = [task for task in model.tasks.values() if fits(task)] if pair is None else _comparing(model, settings)
    if settings.kind == "classify" and len({task.data_set for task in fitting}) > 1:
        names = ", ".join(dict.fromkeys(task.data_set for task in fitting))
        raise RequestError(f"classify of {settings.modality}: expected data_set, whose classifier; one of {names}")
    # A head belongs to a pair, not to a data set; texts are cut and counted as on the measured one.
    return min(fitting, key=lambda task: _distance(task, settings), default=None)


def _comparing(model: EvaluatedModel, settings: EvaluationSettings) -> list[TaskSpec]:
    return comparing(settings, model.tasks.values(), model.embedders, heads=model.imp.config.heads)


def _distance(task: TaskSpec, settings: EvaluationSettings) -> tuple[bool, bool]:
    return task.data_set != settings.data_set, settings.modality not in task.modalities


def _data_set(model: EvaluatedModel, settings: EvaluationSettings, task: TaskSpec | None) -> DataSetSpec:
    """The data set whose decoding applies."""
    if settings.data_set is not None:
        return model.data_sets[settings.data_set]
    if settings.kind == "classify" and task is not None:
        return model.data_sets[task.data_set]
    pair = pair_of(settings, model.embedders)
    tasks = [t for t in model.tasks.values() if t.weight != 0] if pair is None else _comparing(model, settings)
    tasks = [t for t in tasks if settings.modality in t.modalities] or tasks
    found = {_preparation(model, t.data_set, settings): t.data_set for t in reversed(tasks)}
    if len(found) > 1:
        names = ", ".join(sorted(found.values()))
        raise RequestError(
            f"{settings.kind} of {settings.modality}: expected data_set, since they prepare it in different ways: "
            f"one of {names}"
        )
    return model.data_sets[next(iter(found.values()))]


def _preparation(model: EvaluatedModel, name: str, settings: EvaluationSettings) -> str:
    data_set = model.data_sets[name]
    variant = trained_variant(model, settings, settings.modality, data_set)
    return repr((data_set.settings(settings.modality), data_set.clip_s, variant))


def _side(
    model: EvaluatedModel, settings: EvaluationSettings, modality: str, data_set: DataSetSpec, size: int | None
) -> Side:
    variant = trained_variant(model, settings, modality, data_set)
    frames = settings.frames if modality == "video" else None
    if variant.size and (size is not None or frames is not None):
        variant = _sized(model, num_frames=frames or variant.num_frames, size=size or variant.size)
    return Side(modality, model.embedders[modality], data_set, variant)


def trained_variant(
    model: EvaluatedModel, settings: EvaluationSettings, modality: str, data_set: DataSetSpec
) -> Variant:
    """The largest input that was trained, nothing dropped (the paper's rule).

    By the tasks of the data set and kind, else by those of the data set, else by all that use the same layers; an
    image is measured at the size of videos if only those were trained.
    """
    embedder = model.embedders[modality]
    if embedder != "vision":
        return Variant("all", 1)
    classified = settings.kind == "classify"
    found = variants_of(model.tasks.values(), data_set=data_set.name, modality=modality, classified=classified)
    if found:
        return found[0]
    every = [t for t in model.tasks.values() if t.weight != 0 and embedder in map(t.embedder, t.modalities)]
    mine = [t for t in every if t.data_set == data_set.name and modality in t.modalities]
    tasks = mine or [t for t in every if modality in t.modalities] or every
    largest = trained_variants(variant for task in tasks for variant in task.variants)[0]
    if not any(modality in task.modalities for task in tasks):
        frames = (settings.frames or largest.num_frames or _FRAMES) if modality == "video" else 0
        return _sized(model, num_frames=frames, size=largest.size)
    return largest


def _sized(model: EvaluatedModel, *, num_frames: int, size: int) -> Variant:
    try:
        return make_variant(num_frames=num_frames, size=size, drop_rate=0.0, base=None, batch_size=1, spec=model.tokens)
    except ValueError as e:
        raise RequestError(f"sizes and frames: {e}") from e


def classes_of(measurement: Measurement, labels: Iterable[tuple[str, ...]]) -> list[str]:
    """The classes to tell apart: those asked for, the data set's, or every label of the rows."""
    settings, own = measurement.settings, measurement.side.data_set.classes
    if settings.classes:
        return list(settings.classes)
    if own and (settings.manifest is None or settings.kind == "classify"):
        return list(own)
    return sorted({label for row in labels for label in row})
