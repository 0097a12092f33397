"""The card of an exported model: front matter that YAML reads, results with their intervals, licences as given."""

import json
from types import SimpleNamespace

import pytest
import yaml

from model.config import ModelConfig
from model.imp import Imp
from pipeline import recipe as recipes
from pipeline.cli.run_commands import _licenses
from pipeline.errors import RequestError
from pipeline.evaluate.model_card import model_card, results_of
from pipeline.recipe import specs
from tests.exported_models import SIZES, inputs_of

RECIPE = {
    "data_sets": {
        "still": {"manifest": "/home/me/secret/still/train.parquet", "classes": ["a", "b"]},
        "moving": {"manifest": "s3://key:word@bucket/moving.parquet"},
    },
    "tasks": {
        "names": {
            "data_set": "still",
            "objective": "nce",
            "modalities": ["image", "text"],
            "batch_size": 4,
            "variants": [{"size": 32}],
        },
        "films": {
            "data_set": "moving",
            "objective": "nce",
            "modalities": ["video", "audio"],
            "batch_size": 4,
            "variants": [{"size": 32, "frames": 8}],
        },
    },
    "train": {"num_steps": 9},
    "model": {"variant": "imp-tiny-moe"},
}
RESULTS = [
    {
        "dataset": "still: a|b",
        "task": "zero_shot_image",
        "metrics": {"acc1": 0.5, "median_rank": 3},
        "intervals": {"acc1": [0.25, 0.75]},
        "chance": {"acc1": 0.1},
        "num_examples": 40,
        "step": 7,
    }
]


@pytest.fixture(scope="module")
def card():
    recipe = recipes.from_dict(RECIPE)
    imp = Imp(ModelConfig(**SIZES), modalities=("audio", "text", "vision"))
    tasks, data_sets = specs.task_specs(recipe), specs.data_set_specs(recipe)
    model = SimpleNamespace(recipe=recipe, tasks=tasks, data_sets=data_sets, step=7, imp=imp)
    return model_card(model, inputs_of(), RESULTS, {"still": "cc-by-4.0"})


def test_front_matter_is_yaml_with_the_results(card):
    _, front, _ = card.split("---\n", 2)
    found = yaml.safe_load(front)
    assert (found["library_name"], found["license"]) == ("sentence-transformers", "unknown")
    assert found["datasets"] == ["moving", "still"]
    (measured,) = found["model-index"][0]["results"]
    assert measured["dataset"]["name"] == "still: a|b"
    assert measured["metrics"][0] == {"type": "acc1", "value": 0.5, "name": "acc1 (95 % interval 0.25 to 0.75)"}


def test_the_text_says_data_licences_recipe_results_and_limits(card):
    assert "| still | still/train.parquet | cc-by-4.0 | 2 | names |" in card
    assert "| moving | s3://***@bucket/moving.parquet | unknown | none | films |" in card
    assert "secret" not in card and "key:word" not in card
    assert "| `num_steps` | 9 |" in card and "| names | nce | image, text | 32x32 | 4 |" in card
    assert "| still: a\\|b | zero_shot_image | acc1 | 0.5 | 0.25 to 0.75 | 0.1 | 40 |" in card
    assert "| still: a\\|b | zero_shot_image | median_rank | 3 | not computed |  | 40 |" in card
    assert "| `audio_vision` | audio, video |" in card and "Texts are cut after at most 6 tokens." in card


def test_only_results_of_the_exported_step_are_its_own(tmp_path):
    assert results_of(tmp_path, 7) == []
    (tmp_path / "eval.json").write_text("[{")
    assert results_of(tmp_path, 7) == []
    (tmp_path / "eval.json").write_text(json.dumps([*RESULTS, {"step": 7}, RESULTS[0] | {"step": 9}, "x"]))
    assert results_of(tmp_path, 7) == RESULTS


def test_licences_are_of_known_data_sets():
    assert _licenses(["a=mit", "b = CC BY 4.0"], ["a", "b"]) == {"a": "mit", "b": "CC BY 4.0"}
    for wrong in ("c=mit", "a", "a="):
        with pytest.raises(RequestError, match=f"--license: expected DATA_SET=NAME, DATA_SET of a, b, found '{wrong}'"):
            _licenses([wrong], ["a", "b"])
