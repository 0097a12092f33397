"""Recipes as YAML text."""

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from pipeline import recipe as recipes
from tests.pipeline.recipe.base import BASE, DEMO, changed, task


def test_a_merge_key_may_be_replaced():
    assert recipes.read_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")["b"] == {"x": 3, "y": 2}


@pytest.mark.parametrize("source", ["demo", "base"])
def test_dump_and_load_give_the_same_recipe(tmp_path, source):
    recipe = recipes.load(DEMO) if source == "demo" else recipes.from_dict(changed(*task(augment={"area": [0.1, 1.0]})))
    path = tmp_path / "config.yaml"
    path.write_text(recipes.dump(recipe.to_dict()), encoding="utf-8")
    again = recipes.load(path)
    assert again == recipe and again.to_dict() == recipe.to_dict() == yaml.safe_load(path.read_text(encoding="utf-8"))
    recipes.check_resume(yaml.safe_load(path.read_text(encoding="utf-8")), recipe.to_dict())


def test_small_numbers_survive_the_dump():
    recipe = recipes.from_dict(changed(("train.learning_rate", 1e-5)))
    assert yaml.safe_load(recipes.dump(recipe.to_dict()))["train"]["learning_rate"] == 1e-5


def test_text_that_looks_like_a_number_survives_the_dump(tmp_path):
    recipe = recipes.from_dict(changed(("data_sets.photos.classes", ["1e3", "5e-4", "cat"])))
    path = tmp_path / "config.yaml"
    path.write_text(recipes.dump(recipe.to_dict()), encoding="utf-8")
    assert recipes.load(path) == recipe


WORDS = st.sampled_from(["size", "null", "1e3", "a: b", "- x", "{}", "é", ""])
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
NAMED = st.dictionaries(st.text(max_size=20), PLAIN | st.lists(PLAIN, max_size=5), max_size=5)


@examples(max_examples=50, deadline=None)
@given(
    parts=st.dictionaries(
        WORDS, PLAIN | st.lists(PLAIN | NAMED, max_size=3) | st.dictionaries(WORDS, NAMED, max_size=3)
    )
)
def test_whatever_is_dumped_is_read_again(parts):
    """Classes, prompts and names are the user's own: line breaks, quotes, words that YAML takes for something else."""
    assert recipes.read_yaml(recipes.dump(parts)) == (parts or None)


def test_a_dump_has_a_line_a_setting_and_no_line_too_long():
    classes = [f"class number {n}" for n in range(100)]
    recipe = recipes.from_dict(changed(("data_sets.photos.classes", classes)))
    lines = recipes.dump(recipe.to_dict()).splitlines()
    assert "    modalities: [image]" in lines and "  num_steps: 100" in lines
    assert lines[lines.index("    modalities: [image]") + 3 :][:2] == [
        "    variants: [{size: 256, frames: null, drop_rate: 0.0}, {size: 512, frames: null, drop_rate: 0.0},",
        "      {size: 512, frames: null, drop_rate: 0.75}]",
    ]
    assert max(map(len, lines)) <= 120


def test_every_section_of_a_dump_says_what_it_is():
    lines = recipes.dump(recipes.from_dict(BASE).to_dict()).splitlines()
    sections = [number for number, line in enumerate(lines) if line[:1].isalpha() and line.endswith(":")]
    assert {"model:", "text:", "data_sets:", "tasks:", "train:", "cluster:"} <= {lines[n] for n in sections}
    assert all(lines[n - 1].startswith("# ") and lines[n - 1].endswith(".") for n in sections)
