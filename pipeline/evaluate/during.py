"""Measurements of a run that still trains, on a sample of its held-out rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from model.imp import Imp
from pipeline import recipe as recipes
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import RequestError, some_of
from pipeline.evaluate.evaluator import Evaluator
from pipeline.evaluate.measure import default_list, evaluate
from pipeline.evaluate.measurement import measurements
from pipeline.evaluate.metrics import RECALL_AT
from pipeline.evaluate.trained_model import EvaluatedModel, Trained
from pipeline.train.spec import RunSpec

# Endings of the metrics by which a checkpoint may be the best.
_METRICS = ("acc1", "acc5", "mean_per_class_recall", "mean_average_precision", "median_rank")
_METRICS += tuple(f"recall@{k}" for k in RECALL_AT)


class LiveEvaluation:
    """Makes the entries of the recipe's list at any step, each of at most ``logging.evaluate_rows`` rows.

    They equal those of ``imp evaluate`` on that step's checkpoint and the same rows, to the bit on one kind of device.
    """

    def __init__(self, spec: RunSpec, imp: Imp) -> None:
        self._max_rows = spec.logging.evaluate_rows
        recipe = recipes.from_dict(spec.recipe)
        tokenizer = Tokenizer(spec.data.tokenizer) if spec.data.tokenizer else None
        # The data sets are as they were given: those of the stored recipe lack the credentials of their URIs.
        trained = Trained(recipe, spec.data.data_sets, tokenizer)
        config = dataclasses.replace(imp.config, attention="auto")
        self._model = EvaluatedModel(trained, imp.with_config(config), {}, step=0)

    def __call__(self, step: int, params: dict, *, heartbeat: Callable[[str], None]) -> list[dict]:
        """The entries after ``step`` updates. heartbeat: takes a few words on the part that was just finished."""
        self._model.params, self._model.step = params, step
        evaluator = Evaluator(self._model, max_rows=self._max_rows)
        out = []
        try:
            for settings in default_list(self._model):
                out += evaluate(evaluator, [settings])
                heartbeat(f"evaluating {settings.kind} of {settings.modality} after step {step}")
        finally:
            # The next step's update may take their place in memory.
            self._model.params = {}
        return out


def check_best(recipe: recipes.Recipe, spec: RunSpec) -> None:
    """Raises RequestError if ``checkpoint.keep_best`` names no metric that the run is evaluated by."""
    wanted = recipe.checkpoint.keep_best
    if wanted is None:
        return
    plan = _Planned(recipe, spec)
    known = list(dict.fromkeys(f"{m.label}/{m.name}" for e in default_list(plan) for m in measurements(plan, e)))
    place, _, metric = wanted.rpartition("/")
    if place not in known:
        raise RequestError(
            f"checkpoint.keep_best: expected DATA_SET/TASK/METRIC as in eval.json, DATA_SET/TASK one of "
            f"{', '.join(known) or 'none'}; found {wanted}"
        )
    if not metric.endswith(_METRICS):
        raise RequestError(f"checkpoint.keep_best: expected a metric such as {some_of(_METRICS)}; found {metric}")


class _Planned(EvaluatedModel):
    """A model that is still to be trained: it can say what will be measured."""

    def __init__(self, recipe: recipes.Recipe, spec: RunSpec) -> None:
        imp = Imp(spec.model, modalities=())
        super().__init__(Trained(recipe, spec.data.data_sets, None), imp, {}, step=0)
