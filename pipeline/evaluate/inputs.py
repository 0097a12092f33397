"""How evaluation prepares each input of a run's heads: what an exported model is told of its media and texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

from model import terms
from pipeline.data.modalities import EMBEDDERS, TEXT
from pipeline.data.prompts import eval_templates
from pipeline.data.spec import DataSetSpec, TaskSpec, Variant
from pipeline.evaluate.trained_model import TrainedModel
from pipeline.export.inputs import Input, is_built_in, trained_variants


def variants_of(tasks: Iterable[TaskSpec], *, data_set: str, modality: str, classified: bool) -> tuple[Variant, ...]:
    """The sizes that a data set's tasks of one kind trained a modality on, the largest first (the paper's choice)."""

    def fits(task: TaskSpec) -> bool:
        if task.data_set != data_set or task.weight == 0:
            return False
        return task.classified == modality if classified else task.contrasts and modality in task.modalities

    return trained_variants(v for t in tasks if fits(t) for v in t.variants)


def exported_inputs(model: TrainedModel) -> list[Input]:
    """Every modality of every data set with a head that was trained: of common spaces, then of classifiers."""
    tasks = [t for t in model.tasks.values() if t.weight != 0]
    found = [*_of_pairs(tasks, model.data_sets, model.imp.spaces), *_of_classifiers(tasks, model.data_sets)]
    return [one for one in found if one.pair or one.data_set in model.imp.classifiers]


def exported_prompts(inputs: Iterable[Input]) -> dict[str, tuple[str, ...]]:
    """Modality → the sentences around a class in zero-shot classification."""
    media = {one.modality for one in inputs if TEXT in one.pair and one.modality != TEXT}
    return {name: eval_templates(name) for name in sorted(media)}


def _of_pairs(
    tasks: list[TaskSpec], data_sets: Mapping[str, DataSetSpec], spaces: Iterable[tuple[str, ...]]
) -> Iterator[Input]:
    done = set()
    for task in tasks:
        weights, ours = dict(task.pair_weights), {task.embedder(m): m for m in task.modalities}
        for name in (name for name in task.pairs if weights.get(name) != 0):
            pair = next(p for p in terms.pairs(ours) if terms.pair_name(p) == name)
            space = next((s for s in spaces if set(pair) <= set(s)), None)
            if space is None:  # no step of the run trains the task
                continue
            for embedder, other in (pair, pair[::-1]):
                modality = ours[embedder]
                key = (task.data_set, modality, space, ours[other] if modality == TEXT else "")
                if key in done:
                    continue
                done.add(key)
                one = _text(task) if modality == TEXT else _media(tasks, data_sets[task.data_set], task, modality)
                beside = (ours[other],) if modality == TEXT else ()
                yield dataclasses.replace(one, pair=space, beside=beside)


def _of_classifiers(tasks: list[TaskSpec], data_sets: Mapping[str, DataSetSpec]) -> Iterator[Input]:
    """One for each classifier and modality; its classes are those of all tasks that trained it."""
    by_head: dict[tuple[str, str], list[TaskSpec]] = {}
    for task in tasks:
        if task.classified and task.classified != TEXT:
            by_head.setdefault((task.data_set, task.classified), []).append(task)
    for (name, modality), trained in by_head.items():
        data_set = data_sets[name]
        classes = {c for task in trained for c in task.classes or data_set.classes}
        terms_of = {term for task in trained for term, _ in task.objectives}
        yield dataclasses.replace(
            _media(tasks, data_set, trained[0], modality, classified=True),
            classes=tuple(c for c in data_set.classes if c in classes),
            objective="softmax" if "softmax" in terms_of else "sigmoid",
        )


def _text(task: TaskSpec) -> Input:
    return Input(task.data_set, TEXT, EMBEDDERS[TEXT], text_length=task.text_length)


def _media(
    tasks: list[TaskSpec], data_set: DataSetSpec, task: TaskSpec, modality: str, *, classified: bool = False
) -> Input:
    settings = data_set.settings(modality)
    variants = variants_of(tasks, data_set=data_set.name, modality=modality, classified=classified)
    return Input(
        data_set.name,
        modality,
        task.embedder(modality),
        settings=settings if is_built_in(modality) else dataclasses.asdict(settings),
        clip_s=data_set.clip_s,
        # Sizes of the pictures beside a sound do not concern it.
        variants=(Variant("all", 1),) if modality == "audio" else variants,
    )
