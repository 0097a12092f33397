"""Values that a recipe leaves open, and the rules that they follow."""

import pytest
import yaml

from pipeline import recipe as recipes
from pipeline.errors import RequestError
from pipeline.recipe import specs
from tests.pipeline.recipe.base import BASE, changed, task


@pytest.mark.parametrize(
    ("name", "fields", "positives"),
    [
        ("film_text", {}, "text"),
        ("film_sound", {}, "instance"),
        ("film_text", {"positives": "labels"}, "labels"),
        ("film_text", {"text": "labels"}, "labels"),
        ("film_text", {"positives": "instance"}, "instance"),
    ],
)
def test_positives_follow_from_the_text(name, fields, positives):
    assert specs.task_specs(recipes.from_dict(changed(*task(name, **fields))))[name].positives == positives


def in_use(*changes) -> tuple[float, ...]:
    """Learning rate, clipping, scale of the patches' rate, initial temperature."""
    recipe = recipes.from_dict(changed(*changes))
    optimizer, model = specs.optimizer_config(recipe), specs.model_config(recipe, vocab_size=16)
    assert recipe.model.temperature_init == model.temperature_init
    return (optimizer.peak_learning_rate, optimizer.clip_norm, optimizer.patch_scale, model.temperature_init)


def batches(of_images: int, of_films: int) -> list:
    return [
        ("tasks.photo_classes.batch_size", of_images),
        ("tasks.film_text.batch_size", of_films),
        ("tasks.film_sound.batch_size", 16),
    ]


@pytest.mark.parametrize(
    ("of_images", "of_films", "wanted"),
    [
        (64, 64, (5e-4, 0.1, 0.1, 0.1)),
        (16, 32, (5e-4, 0.1, 0.1, 0.1)),
        # Half of the ten doublings: the square root of both ends' product.
        (2048, 2048, (7.1e-4, 0.32, 0.32, 0.32)),
        # Each doubling is a factor of 10 ** (1 / 10).
        (128, 128, (5.4e-4, 0.13, 0.13, 0.13)),
        (65_536, 65_536, (1e-3, 1.0, 1.0, 1.0)),
        (1 << 20, 1 << 20, (1e-3, 1.0, 1.0, 1.0)),
        # The temperature is that of tasks that compare.
        (65_536, 64, (1e-3, 1.0, 1.0, 0.1)),
        (64, 65_536, (1e-3, 1.0, 1.0, 1.0)),
    ],
)
def test_open_values_follow_the_batch(of_images, of_films, wanted):
    assert in_use(*batches(of_images, of_films)) == wanted


def test_a_dense_model_ends_at_its_own_temperature():
    dense = ("model.variant", "imp-tiny")
    assert in_use(dense, *batches(64, 64))[3] == 0.1 and in_use(dense, *batches(65_536, 65_536))[3] == 0.2


def test_a_value_of_the_recipe_wins():
    given = {"learning_rate": 2e-4, "clip_norm": 3.0, "patch_learning_rate_scale": 0.0}
    changes = [(f"train.{key}", value) for key, value in given.items()] + [("model.temperature_init", 0.7)]
    assert in_use(*changes) == (2e-4, 3.0, 0.0, 0.7)
    # The rule stays above a floor that the recipe sets.
    assert in_use(("model.temperature_floor", 0.3))[3] == 0.3


def test_a_resolved_recipe_leaves_nothing_of_the_model_and_the_optimizer_open():
    resolved = recipes.from_dict(BASE).to_dict()
    assert None not in {**resolved["model"], **resolved["model"]["moe"], **resolved["train"]}.values()
    assert recipes.from_dict(resolved).to_dict() == resolved
    recipes.check_resume(resolved, recipes.from_dict(changed(("train.learning_rate", 5e-4))).to_dict())
    with pytest.raises(RequestError, match=r"learning_rate = 0\.0005, the recipe now says 0\.001"):
        recipes.check_resume(resolved, recipes.from_dict(changed(("train.learning_rate", 1e-3))).to_dict())


def test_a_run_that_goes_on_keeps_what_its_recipe_leaves_open(tmp_path):
    """A task of a larger batch comes; what the recipe says itself is still compared."""
    config, run_dir = tmp_path / "recipe.yaml", tmp_path / "run"
    run_dir.mkdir()
    old = recipes.from_dict(BASE).to_dict()
    (run_dir / "config.yaml").write_text(recipes.dump(old), encoding="utf-8")
    more = BASE["tasks"]["photo_classes"] | {"batch_size": 4096}
    config.write_text(yaml.safe_dump(changed(("tasks.more", more), ("resume.allow_mixture_change", True))))
    assert recipes.load(config).train.learning_rate == 7.6e-4
    found = recipes.load(config, run_dir=run_dir)
    assert (found.train, found.model) == (recipes.from_dict(BASE).train, recipes.from_dict(BASE).model)
    assert recipes.check_resume(old, found.to_dict()) == ["tasks.more is new"]
    assert recipes.load(config, ["train.learning_rate=1e-4"], run_dir=run_dir).train.learning_rate == 1e-4
    for broken in ("", "- a", "a: [", "train: 3\nmodel: {temperature_init: x}"):
        (run_dir / "config.yaml").write_text(broken)
        assert recipes.load(config, run_dir=run_dir) == recipes.load(config)
