"""Which measurements the heads of a run's tasks allow."""

import pytest

from pipeline.data.modalities import EMBEDDERS
from pipeline.data.spec import TaskSpec
from pipeline.recipe.measurable import comparing, missing_head
from pipeline.recipe.settings import EvaluationSettings
from pipeline.recipe.specs import loss_fields


def task(name: str, *modalities: str, weight: float | None = None) -> TaskSpec:
    fields = loss_fields((("nce", 1.0),), modalities, EMBEDDERS)
    return TaskSpec(name=name, data_set=name, variants=(), weight=weight, **fields)


TASKS = [task("pictures", "image", "text"), task("sounds", "audio", "text")]


@pytest.mark.parametrize("heads, found", [("per_pair", []), ("per_modality", ["sounds"])])
def test_one_space_compares_what_no_task_compared(heads, found):
    """Images and sounds meet only through texts."""
    asked = EvaluationSettings(data_set="pictures", kind="retrieval", modality="image", other="audio")
    assert [t.name for t in comparing(asked, TASKS, EMBEDDERS, heads=heads)] == found
    missing = missing_head(asked, TASKS, EMBEDDERS, heads=heads)
    assert (missing is None) is bool(found)


def test_the_tasks_of_the_pair_come_before_those_of_the_space():
    asked = EvaluationSettings(data_set="pictures", kind="retrieval", modality="image")
    assert [t.name for t in comparing(asked, TASKS, EMBEDDERS, heads="per_modality")] == ["pictures"]


def test_a_chain_that_is_not_trained_makes_no_space():
    tasks = [TASKS[0], task("sounds", "audio", "text", weight=0.0)]
    asked = EvaluationSettings(data_set="pictures", kind="retrieval", modality="image", other="audio")
    assert comparing(asked, tasks, EMBEDDERS, heads="per_modality") == []
