"""The structure (compiled graph) of each task and variant."""

from __future__ import annotations

from model.structure import InputShape, Structure
from pipeline.data.plan import model_modalities
from pipeline.data.spec import DataSetSpec, TaskSpec, TokenSpec, Variant


def structure_of(task: TaskSpec, variant: Variant, data_set: DataSetSpec, tokens: TokenSpec) -> Structure:
    """The structure of the graph that is compiled for a task's variant."""
    frames = tokens.vision_patch[0] if variant.num_frames else 1
    values = frames * tokens.vision_patch[1] * tokens.vision_patch[2] * 3
    audio_grid, audio_patch = data_set.audio.grid, data_set.audio.patch
    shapes = {
        "vision": InputShape("vision", variant.num_vision_tokens, values, 3),
        "audio": InputShape("audio", audio_grid[0] * audio_grid[1], audio_patch[0] * audio_patch[1], 2),
        "text": InputShape("text", task.text_length, 0, 1),
    }
    for name, (num_tokens, embedder) in data_set.own_patches.items():
        shapes[name] = InputShape(name, num_tokens, embedder.num_values, len(embedder.positions))
    inputs = tuple(shapes[m] for m in model_modalities(task))
    classifier = {}
    if task.classifies:
        columns = {name: column for column, name in enumerate(data_set.classes)}
        classifier = {
            "classifier": task.data_set,
            "num_classes": len(columns),
            "classes": tuple(columns[c] for c in task.classes or data_set.classes),
        }
    return Structure(
        task.objectives,
        variant.global_batch_size,
        inputs,
        pair_weights=task.pair_weights,
        microbatches=task.microbatches,
        **classifier,
    )
