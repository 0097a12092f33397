"""A classifier for an export, fitted on labelled rows: the linear probe of the evaluation as a layer of the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from model.groups import classifier_group
from model.imp import Imp
from pipeline.errors import RequestError
from pipeline.evaluate import probes
from pipeline.evaluate.evaluator import Evaluator
from pipeline.evaluate.kinds import targets_of
from pipeline.evaluate.measurement import Measurement
from pipeline.evaluate.trained_model import EvaluatedModel
from pipeline.export.inputs import Input, is_built_in


@dataclasses.dataclass(frozen=True)
class AddedClassifier:
    """name: for ``Encoder.classify``, as of a data set. kernel (width, classes), bias (classes,): float32."""

    name: str
    classes: tuple[str, ...]
    kernel: np.ndarray
    bias: np.ndarray
    input: Input

    def added_to(self, imp: Imp, params: dict) -> tuple[Imp, dict]:
        """The model with the classifier, and its parameters."""
        larger = Imp(
            imp.config,
            modalities=imp.modalities,
            pairs=imp.pairs,
            offsets=imp.offsets,
            classifiers=imp.classifiers | {self.name: len(self.classes)},
        )
        return larger, params | {classifier_group(self.name): {"linear": {"kernel": self.kernel, "bias": self.bias}}}


def fit_classifier(model: EvaluatedModel, measurement: Measurement) -> AddedClassifier:
    """Fits a linear probe on the rows that a measurement learns from. Raises RequestError if they cannot teach it."""
    name = Path(measurement.fit_manifest).stem.replace("-", "_")
    if not name.isidentifier() or name in model.imp.classifiers:
        raise RequestError(
            f"--linear-probe: the file's name becomes the classifier's: expected letters, digits and _, and none of "
            f"{', '.join(model.imp.classifiers) or 'the run'}'s classifiers; found {name}"
        )
    rows = Evaluator(model).fit_rows(measurement)
    classes, chosen, targets = targets_of(measurement, rows)
    kernel, bias = probes.linear_layer(rows.features[chosen].mean(1), targets)
    side, one_each = measurement.side, bool((targets.sum(1) == 1).all())
    settings = side.data_set.settings(side.modality)
    return AddedClassifier(
        name,
        tuple(classes),
        kernel,
        bias,
        Input(
            name,
            side.modality,
            side.embedder,
            settings=settings if is_built_in(side.modality) else dataclasses.asdict(settings),
            clip_s=side.data_set.clip_s,
            variants=(side.variant,),
            classes=tuple(classes),
            objective="softmax" if one_each else "sigmoid",
        ),
    )
