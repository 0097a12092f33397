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
from pipeline.data.spec import DataSetSpec
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import RequestError
from pipeline.export.features import Features
from pipeline.recipe import specs
from pipeline.recipe.added import embedders
from pipeline.train.checkpoint import Checkpoints
from pipeline.train.devices import host_device, use_compute_type
from pipeline.train.mixture.structures import structure_of


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run has learned from, as evaluation needs it: the recipe and all that follows from it."""

    recipe: recipes.Recipe
    data_sets: dict[str, DataSetSpec]
    tokenizer: Tokenizer | None


class EvaluatedModel(Features):
    """Parameters with all that is needed to feed them."""

    def __init__(self, trained: Trained, imp: Imp, params: dict, *, step: int) -> None:
        super().__init__(imp, params)
        self.step = step
        self.recipe = trained.recipe
        self.data_sets = dict(trained.data_sets)
        self.tokenizer = trained.tokenizer
        self.tasks = specs.task_specs(self.recipe)
        self.tokens = specs.token_spec(self.recipe)
        # Modality → the model's name for its layers.
        self.embedders = embedders(self.recipe.modalities)

    def use_recipe(self, recipe: recipes.Recipe) -> None:
        """Evaluates by another recipe's ``evaluate`` list and data sets; the trained tasks and classes stay.

        Raises RequestError if a data set's classes differ from those the model was trained on.
        """
        for name, data_set in specs.data_set_specs(recipe).items():
            if name in self.data_sets and data_set.classes != self.data_sets[name].classes:
                raise RequestError(f"data_sets.{name}.classes: the model was trained on another list of classes")
            self.data_sets[name] = data_set
        self.recipe = recipe


class TrainedModel(EvaluatedModel):
    """The parameters of a checkpoint with all that is needed to feed them.

    Everything comes from the checkpoint: the recipe, the class lists, the tokenizer. step: the newest that is intact,
    that of a step, or "best" (``checkpoint.keep_best``). Raises RequestError if it is not there.
    """

    def __init__(self, run_dir: Path, step: int | str | None = None) -> None:
        with contextlib.closing(Checkpoints(run_dir)) as checkpoints:
            data = checkpoints.data(_chosen(checkpoints, step))
            recipe = recipes.from_stored(data["config"])
            tokenizer = base64.b64decode(data["tokenizer"])
            trained = Trained(recipe, specs.data_set_specs(recipe), Tokenizer(tokenizer) if tokenizer else None)
            imp = Imp.for_structures(_config(trained), _structures(trained))
            params = _load_parameters(checkpoints, imp, data["step"])
            super().__init__(trained, imp, params, step=data["step"])


def _chosen(checkpoints: Checkpoints, step: int | str | None) -> int | None:
    if step is None:
        found, lines = checkpoints.choose()
        for line in lines:
            print(f"warning: {line}", file=sys.stderr, flush=True)
        return found
    wanted = checkpoints.best_step if step == "best" else step
    if wanted is None:
        raise RequestError("no checkpoint is kept as the best: set checkpoint.keep_best and logging.evaluate_every")
    if wanted not in checkpoints.steps:
        raise RequestError(f"step {wanted}: expected one of the checkpoints {checkpoints.steps}")
    if damage := checkpoints.damage(wanted):
        raise RequestError(f"checkpoint {wanted} is damaged: {damage}")
    return wanted


def _config(trained: Trained) -> ModelConfig:
    vocab_size = trained.tokenizer.vocab_size if trained.tokenizer else NO_VOCABULARY
    config = use_compute_type(specs.model_config(trained.recipe, vocab_size=vocab_size))
    # This may be another machine than that of training, whose kernel it may not have.
    return dataclasses.replace(config, attention="auto")


def _structures(trained: Trained) -> list[Structure]:
    tasks, tokens = specs.task_specs(trained.recipe), specs.token_spec(trained.recipe)
    running = specs.sampler_spec(trained.recipe).runs(tasks)
    return [
        structure_of(t, v, trained.data_sets[t.data_set], tokens)
        for t in tasks.values()
        for v in t.variants
        if t.name in running
    ]


def _load_parameters(checkpoints: Checkpoints, imp: Imp, step: int) -> dict:
    """The parameters on the first device, without the moments, two thirds of the state."""
    sharding = jax.sharding.SingleDeviceSharding(host_device())
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), imp.shapes())
    state = checkpoints.state({name: {"params": group} for name, group in params.items()}, step=step)
    return jax.device_put({name: group["params"] for name, group in state.items()}, jax.local_devices()[0])
