"""The export of a run's model, with all that prepares its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.evaluate.added_classifier import AddedClassifier
from pipeline.evaluate.inputs import exported_inputs, exported_prompts
from pipeline.evaluate.model_card import model_card, results_of
from pipeline.evaluate.trained_model import TrainedModel
from pipeline.export import save_model


def export_model(
    model: TrainedModel,
    folder: Path,
    *,
    run: Path | None = None,
    licenses: Mapping[str, str] | None = None,
    stablehlo: bool = False,
    classifier: AddedClassifier | None = None,
) -> None:
    """Writes the model to a new or empty folder that ``pipeline.export.load`` opens. Raises RequestError.

    run: its directory, for a model card with the run's results. licenses: data set → licence, for the card. stablehlo:
    also write functions for jax alone. classifier: one more than the run trained.
    """
    inputs, imp, params = exported_inputs(model), model.imp, model.params
    classes = {name: list(model.data_sets[name].classes) for name in imp.classifiers}
    if classifier is not None:
        imp, params = classifier.added_to(imp, params)
        inputs, classes = [*inputs, classifier.input], classes | {classifier.name: list(classifier.classes)}
    card = "" if run is None else model_card(model, inputs, results_of(run, model.step), licenses or {})
    save_model(
        folder,
        imp,
        params,
        step=model.step,
        classes=classes,
        tokenizer=model.tokenizer.model if model.tokenizer else None,
        inputs=inputs,
        prompts=exported_prompts(inputs),
        stablehlo=stablehlo,
        card=card,
    )
