"""What a model answers for each row of a sample: the nearest texts, or the likeliest classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from pipeline.data.modalities import TEXT
from pipeline.data.plan import group_arrays
from pipeline.data.prompts import eval_templates
from pipeline.data.spec import TaskSpec
from pipeline.data.tokenizer import encode_text
from pipeline.evaluate.showcase.sample import Sample
from pipeline.evaluate.trained_model import TrainedModel
from pipeline.export.features import class_anchors, unit

# Maximum number of texts that answers are chosen from, and of classes in a table of confusions.
_MAX_TEXTS, _MAX_CLASSES = 200, 24
# Minimum number of rows behind a table of confusions.
_MIN_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Classes:
    """names: the answers to choose from. scores: (rows, answers). is_exclusive: exactly one of them is right."""

    names: list[str]
    scores: np.ndarray
    is_exclusive: bool = True
    title: str = "likeliest classes"

    def is_right(self, sample: Sample, row: int, answer: int) -> bool:
        """Whether an answer is one of a row's labels or captions."""
        return self.names[answer] in (*sample.labels[row], *sample.texts[row])

    @classmethod
    def of(cls, model: TrainedModel, sample: Sample, modality: str) -> Classes | None:
        """By the data set's classifier, with probabilities; None if it has none for this modality."""
        tasks = [t for t in sample.tasks if t.classified == modality]
        if not tasks or sample.data_set.name not in model.imp.classifiers:
            return None
        all_classes = list(sample.data_set.classes)
        trained = {name for task in tasks for name in task.classes or all_classes}
        columns = [column for column, name in enumerate(all_classes) if name in trained]
        names = [all_classes[column] for column in columns]
        logits = model.logits(sample.features[modality], sample.data_set.name)
        logits = logits[:, columns].astype(np.float64)
        is_exclusive = any("softmax" in dict(task.objectives) for task in tasks)
        return cls(names, _softmax(logits) if is_exclusive else 1 / (1 + np.exp(-logits)), is_exclusive)


@dataclasses.dataclass(frozen=True)
class Texts(Classes):
    """The cosines with texts, in the common space of a modality and text. media, anchors: unit vectors there."""

    media: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0)))
    anchors: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0)))

    @classmethod
    def of(cls, model: TrainedModel, sample: Sample, modality: str) -> Texts | None:
        """Classes by name if a task was trained so, else the captions of the sample; None without a common space."""
        tasks = sorted(filter(lambda t: _is_paired(t, modality), sample.tasks), key=lambda t: t.text != "labels")
        if not tasks or model.tokenizer is None:
            return None
        task, source = tasks[0], tasks[0].embedder(modality)
        is_labels = task.text == "labels"
        names = list(task.classes or sample.data_set.classes) if is_labels else _captions(sample.texts)
        if not names:
            return None
        templates = eval_templates(modality) if is_labels else ("{}",)
        texts = [template.replace("{}", name) for name in names for template in templates]
        anchors = class_anchors(_projected(model, task, texts, target=source), len(templates))
        media = unit(model.project(sample.features[modality], source=source, target=TEXT))
        return cls(names, media @ anchors.T, is_labels, "nearest texts", media, anchors)


def _softmax(logits: np.ndarray) -> np.ndarray:
    values = np.exp(logits - logits.max(1, keepdims=True))
    return values / values.sum(1, keepdims=True)


def _is_paired(task: TaskSpec, modality: str) -> bool:
    """Whether a task trains the space of a modality and text."""
    if modality not in task.modalities or TEXT not in task.modalities:
        return False
    name = "_".join(sorted((task.embedder(modality), TEXT)))
    return name in task.pairs and dict(task.pair_weights).get(name) != 0


def _captions(texts: Iterable[tuple[str, ...]]) -> list[str]:
    """The first captions of all rows, each once."""
    return list(dict.fromkeys(row[0] for row in texts if row))[:_MAX_TEXTS]


def _projected(model: TrainedModel, task: TaskSpec, texts: list[str], *, target: str) -> np.ndarray:
    samples = [group_arrays(encode_text(model.tokenizer, text, task.text_length))[TEXT] for text in texts]
    return model.project(model.features(TEXT, samples), source=TEXT, target=target)


def confusion(sample: Sample, modality: str, answers: Classes | None) -> dict | None:
    """{"title", "classes", "counts"}: rows of a class down, answers across. None where several answers may be right."""
    if answers is None or not answers.is_exclusive or not 2 <= len(answers.names) <= _MAX_CLASSES:
        return None
    counts = np.zeros((len(answers.names), len(answers.names)), int)
    for row, labels in enumerate(sample.labels):
        truth = [answers.names.index(label) for label in labels if label in answers.names]
        if len(truth) == 1:
            counts[truth[0], int(answers.scores[row].argmax())] += 1
    if counts.sum() < _MIN_ROWS:
        return None
    by = "its classifier" if type(answers) is Classes else "the nearest class name"
    title = f"{sample.data_set.name}, {modality}, by {by}"
    return {"title": title, "classes": answers.names, "counts": counts.tolist()}
