"""Measurements that a recipe's tasks make possible: those whose heads they train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from model import terms
from pipeline.data.spec import TaskSpec
from pipeline.errors import some_of
from pipeline.recipe.task_settings import EvaluationSettings

# Kinds that learn from labelled rows by themselves, on features without a head.
LEARNING = ("linear_probe", "knn")


def pair_of(evaluation: EvaluationSettings, embedders: Mapping[str, str]) -> str | None:
    """The name of the pair of modalities that a measurement compares; None if it needs none.

    embedders: modality → the model's name for its layers.
    """
    if evaluation.kind not in ("zero_shot", "retrieval"):
        return None
    return terms.pair_name((embedders[evaluation.modality], embedders[other_of(evaluation)]))


def other_of(evaluation: EvaluationSettings) -> str:
    """The modality with which a measurement compares its own."""
    return evaluation.other if evaluation.kind == "retrieval" else "text"


def compares(task: TaskSpec, pair: str) -> bool:
    """Whether a task trains the heads of a pair."""
    return task.weight != 0 and pair in task.pairs and dict(task.pair_weights).get(pair) != 0


def comparing(
    evaluation: EvaluationSettings, tasks: Iterable[TaskSpec], embedders: Mapping[str, str], *, heads: str
) -> list[TaskSpec]:
    """The tasks that train what a comparison needs: its pair, or else, with heads "per_modality", its space."""
    tasks = [task for task in tasks if task.weight != 0]
    two = (embedders[evaluation.modality], embedders[other_of(evaluation)])
    own = [task for task in tasks if compares(task, terms.pair_name(two))]
    if own or heads == "per_pair":
        return own
    trained = [p for t in tasks for p in terms.pairs(map(t.embedder, t.modalities)) if compares(t, terms.pair_name(p))]
    if not any(set(two) <= set(space) for space in terms.spaces(trained, heads=heads)):
        return []
    with_other = [task for task in tasks if other_of(evaluation) in task.modalities]
    return with_other or [task for task in tasks if evaluation.modality in task.modalities]


def classifies(task: TaskSpec, embedder: str) -> bool:
    """Whether a task trains a classifier over the layers of this name."""
    return task.weight != 0 and task.classified is not None and task.embedder(task.classified) == embedder


def missing_head(
    evaluation: EvaluationSettings, tasks: Iterable[TaskSpec], embedders: Mapping[str, str], *, heads: str = "per_pair"
) -> str | None:
    """What no task trains and the measurement needs, in words, with what there is; None if nothing is missing."""
    tasks = [task for task in tasks if task.weight != 0]
    what = f"{evaluation.kind} of {evaluation.modality}"
    embedder = embedders[evaluation.modality]
    if pair := pair_of(evaluation, embedders):
        if terms.pair_name((embedder, embedder)) == pair:
            return f"{what} with {other_of(evaluation)}: expected two modalities with layers of their own"
        known = sorted({name for task in tasks for name in task.pairs if compares(task, name)})
        found = comparing(evaluation, tasks, embedders, heads=heads)
        return None if found else f"{what} needs the pair {pair}; trained are {', '.join(known) or 'none'}"
    if evaluation.kind == "classify":
        known = sorted({f"{t.data_set} ({t.classified})" for t in tasks if t.classified is not None})
        fitting = [t for t in tasks if classifies(t, embedder) and evaluation.data_set in (None, t.data_set)]
        on = f" on {evaluation.data_set}" if evaluation.data_set else ""
        return None if fitting else f"{what}{on} needs a classifier; trained are {some_of(known) or 'none'}"
    known = sorted({m for task in tasks for m in task.modalities})
    seen = any(task.embedder(m) == embedder for task in tasks for m in task.modalities)
    return None if seen else f"{what} needs a task with {evaluation.modality}; trained are {some_of(known) or 'none'}"
