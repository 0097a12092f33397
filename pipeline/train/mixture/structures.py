"""The structure (compiled graph) of each task and variant."""

from __future__ import annotations

from model.structure import Inputs, Structure
from pipeline.data.modalities import Embedder, load
from pipeline.data.plan import model_modalities
from pipeline.data.spec import DataSetSpec, TaskSpec, TokenSpec, Variant


def structure_of(task: TaskSpec, variant: Variant, data_set: DataSetSpec, tokens: TokenSpec) -> Structure:
    """The compiled graph that a task's variant needs."""
    frames = tokens.vision_patch[0] if variant.num_frames else 1
    values = frames * tokens.vision_patch[1] * tokens.vision_patch[2] * 3
    audio_grid, audio_patch = data_set.audio.grid, data_set.audio.patch
    shapes = {
        "vision": Inputs("vision", variant.num_vision_tokens, values, 3),
        "audio": Inputs("audio", audio_grid[0] * audio_grid[1], audio_patch[0] * audio_patch[1], 2),
        "text": Inputs("text", task.text_length, 0, 1),
    }
    for added in data_set.added:
        own = added.modality.embedder
        if isinstance(own, Embedder):
            num_tokens = load(own.num_tokens)(added.settings)
            shapes[added.name] = Inputs(added.name, num_tokens, own.num_values, len(own.positions))
    inputs = tuple(shapes[m] for m in model_modalities(task))
    classifier = {}
    if task.classifies:
        counted = task.classes or data_set.classes
        classifier = {
            "classifier": task.data_set,
            "num_classes": len(data_set.classes),
            "classes": tuple(data_set.classes.index(c) for c in counted),
        }
    return Structure(
        task.objectives,
        variant.global_batch_size,
        inputs,
        pair_weights=task.pair_weights,
        microbatches=task.microbatches,
        **classifier,
    )
