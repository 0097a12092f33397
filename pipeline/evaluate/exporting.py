"""The export of a run's model, with all that prepares its inputs."""

from __future__ import annotations

from pathlib import Path

from pipeline.evaluate.inputs import exported_inputs, exported_prompts
from pipeline.evaluate.trained_model import TrainedModel
from pipeline.export import save_model


def export_model(model: TrainedModel, folder: Path) -> None:
    """Writes the model to a new or empty folder that ``pipeline.export.load`` opens. Raises RequestError."""
    inputs = exported_inputs(model)
    save_model(
        folder,
        model.imp,
        model.params,
        step=model.step,
        classes={name: list(model.data_sets[name].classes) for name in model.imp.classifiers},
        tokenizer=model.tokenizer.model if model.tokenizer else None,
        inputs=inputs,
        prompts=exported_prompts(inputs),
    )
