"""A trained model from a run directory alone, and features of media and text through it."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import sys
from pathlib import Path

import jax

from model.config import NO_VOCABULARY, ModelConfig
from model.imp import Imp
from model.structure import Structure
from pipeline import recipe as recipes
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import RequestError
from pipeline.export.features import Features
from pipeline.recipe import specs
from pipeline.train.checkpoint import Checkpoints
from pipeline.train.devices import host_device, use_compute_type
from pipeline.train.mixture.structures import structure_of


class TrainedModel(Features):
    """The parameters of the newest checkpoint with all that is needed to feed them.

    Everything comes from the checkpoint: the recipe, the class lists, the tokenizer.
    """

    def __init__(self, run_dir: Path) -> None:
        with contextlib.closing(Checkpoints(run_dir)) as checkpoints:
            step, lines = checkpoints.choose()
            for line in lines:
                print(f"warning: {line}", file=sys.stderr, flush=True)
            data = checkpoints.data(step)
            self.step = data["step"]
            self.recipe = recipes.from_dict(data["config"])
            self.data_sets, self.tasks = specs.data_set_specs(self.recipe), specs.task_specs(self.recipe)
            tokenizer = base64.b64decode(data["tokenizer"])
            self.tokenizer = Tokenizer(tokenizer) if tokenizer else None
            self.tokens = specs.token_spec(self.recipe)
            imp = Imp.for_structures(self._config(), self._structures())
            super().__init__(imp, _load_parameters(checkpoints, imp, self.step))

    def _config(self) -> ModelConfig:
        vocab_size = self.tokenizer.vocab_size if self.tokenizer else NO_VOCABULARY
        config = use_compute_type(specs.model_config(self.recipe, vocab_size=vocab_size))
        # This may be another machine than that of training, whose kernel it may not have.
        return dataclasses.replace(config, attention="auto")

    def _structures(self) -> list[Structure]:
        running = specs.sampler_spec(self.recipe).runs(self.tasks)
        return [
            structure_of(t, v, self.data_sets[t.data_set], self.tokens)
            for t in self.tasks.values()
            for v in t.variants
            if t.name in running
        ]

    def use_recipe(self, recipe: recipes.Recipe) -> None:
        """Evaluates by another recipe's ``evaluate`` list and data sets; the trained tasks and classes stay.

        Raises RequestError if a data set's classes differ from those the model was trained on.
        """
        for name, data_set in specs.data_set_specs(recipe).items():
            if name in self.data_sets and data_set.classes != self.data_sets[name].classes:
                raise RequestError(f"data_sets.{name}.classes: the model was trained on another list of classes")
            self.data_sets[name] = data_set
        self.recipe = recipe


def _load_parameters(checkpoints: Checkpoints, imp: Imp, step: int) -> dict:
    """The parameters on the first device, without the moments, two thirds of the state."""
    sharding = jax.sharding.SingleDeviceSharding(host_device())
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), imp.shapes())
    state = checkpoints.state({name: {"params": group} for name, group in params.items()}, step=step)
    return jax.device_put({name: group["params"] for name, group in state.items()}, jax.local_devices()[0])
