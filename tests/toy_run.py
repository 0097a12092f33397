"""A run directory with a checkpoint of the toy recipe as it starts, for tests of what is done with a finished run."""

from __future__ import annotations

import base64
from pathlib import Path

from pipeline.data.tokenizer import train_tokenizer
from tests.toy_recipe import DIGITS


def save_toy_run(folder: Path, raw: dict) -> Path:
    """Writes the checkpoint. raw: a ``toy_recipe_of``, to which texts for its videos and a classifier are added."""
    from model.imp import Imp
    from model.step import init_state
    from pipeline import recipe as recipes
    from pipeline.recipe import specs
    from pipeline.train.checkpoint import Checkpoints
    from pipeline.train.devices import use_compute_type
    from pipeline.train.mixture.structures import structure_of

    raw["model"]["common_dim"] = 16
    text = {"text": "labels", "positives": "labels", "objective": "nce"}
    with_text = text | {"modalities": ["video", "text"], "text_length": 8}
    raw["tasks"]["video_text"] = raw["tasks"]["video_audio"] | with_text
    raw["tasks"]["sounds"] = {"data_set": "moving", "objective": "softmax", "modalities": ["audio"], "batch_size": 4}
    raw["tasks"]["sounds"]["classes"] = DIGITS
    recipe = recipes.from_dict(raw)
    data_sets, tokens = specs.data_set_specs(recipe), specs.token_spec(recipe)
    tokenizer = train_tokenizer([f"the digit {d} moving left" for d in DIGITS], vocab_size=60)
    structures = [
        structure_of(t, v, data_sets[t.data_set], tokens) for t in specs.task_specs(recipe).values() for v in t.variants
    ]
    config = use_compute_type(specs.model_config(recipe, vocab_size=tokenizer.vocab_size))
    checkpoints = Checkpoints(folder)
    data = {"config": recipe.to_dict(), "tokenizer": base64.b64encode(tokenizer.model).decode()}
    checkpoints.save(3, state=init_state(Imp.for_structures(config, structures).init(5)), data=data)
    checkpoints.wait()
    return folder
