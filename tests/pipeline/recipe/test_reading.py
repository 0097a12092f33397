"""From a file and overrides to a recipe: what is refused and how it is said."""

import pytest
import yaml

from pipeline import recipe as recipes
from pipeline.errors import RequestError
from tests.pipeline.recipe.base import BASE, DELETE, changed, refused


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("seeed", "unknown key 'seeed'; did you mean 'seed'?"),
        ("train.num_stepz", "unknown key 'train.num_stepz'; did you mean 'train.num_steps'?"),
        ("model.moe.capacity", "unknown key 'model.moe.capacity'; did you mean 'model.moe.capacity_factor'?"),
        ("data_sets.photos.clases", "unknown key 'data_sets.photos.clases'; did you mean 'data_sets.photos.classes'?"),
        ("data_sets.photos.audio.hop_len", "did you mean 'data_sets.photos.audio.hop_length'?"),
        ("tasks.film_text.modality", "did you mean 'tasks.film_text.modalities'?"),
        ("tasks.film_text.augment.areas", "did you mean 'tasks.film_text.augment.area'?"),
        ("tasks.film_text.variants.0.droprate", "did you mean 'tasks.film_text.variants.0.drop_rate'?"),
        # Of a section left out, of another section, of two sections.
        ("num_steps", "unknown key 'num_steps'; did you mean 'train.num_steps'?"),
        ("train.seed", "unknown key 'train.seed'; did you mean 'seed'?"),
        ("tasks.film_text.drop_rate", "did you mean 'tasks.film_text.variants.0.drop_rate'?"),
        ("data_sets.photos.fps", "did you mean 'data_sets.photos.video.fps'?"),
        ("data_sets.photos.short_side", "did you mean 'data_sets.photos.image.short_side' or 'data_sets.photos.video."),
        ("cluster.xyz", "unknown key 'cluster.xyz'; known: num_workers, max_failures, stall_timeout_s, "),
    ],
)
def test_an_unknown_key_names_the_nearest(path, message):
    assert message in refused((path, 1))


@pytest.mark.parametrize("path", ["train", "data_sets", "tasks", "train.num_steps", "tasks.film_text.batch_size"])
def test_a_missing_key_is_named(path):
    assert refused((path, DELETE)) == f"missing key {path!r}"


def test_a_misspelt_key_comes_before_the_key_that_it_leaves_missing():
    raw = changed(("train.num_steps", DELETE), ("train.num_stepz", 3))
    with pytest.raises(RequestError) as caught:
        recipes.from_dict(raw)
    assert str(caught.value) == "unknown key 'train.num_stepz'; did you mean 'train.num_steps'?"
    with pytest.raises(RequestError) as caught:
        recipes.from_dict({"taks" if key == "tasks" else key: value for key, value in raw.items()})
    assert str(caught.value) == "unknown key 'train.num_stepz'; did you mean 'train.num_steps'? (and 2 more)"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train", 5, "train: expected settings such as train.num_steps=..., found 5"),
        ("train", None, "train: expected settings such as train.num_steps=..., found None"),
        ("tasks", [1], "tasks: expected settings such as tasks.NAME.data_set=..., found [1]"),
        ("tasks.film_text", "x", "tasks.film_text: expected settings such as tasks.film_text.data_set=..., found 'x'"),
        ("model.moe", "big", "model.moe: expected settings such as model.moe.num_experts=..., found 'big'"),
        ("evaluate", [5], "evaluate.0: expected settings such as evaluate.0.kind=..., found 5"),
        ("tasks.film_text.pair_weights", 3, "tasks.film_text.pair_weights: expected a mapping, found 3"),
        ("data_sets.films.held_out", 3, "data_sets.films.held_out: Input should be a valid string; found 3"),
    ],
)
def test_a_value_where_settings_belong(path, value, message):
    assert refused((path, value)).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: {1: {}}", "tasks: expected keys that are text, found 1; quote it"),
        ("true: 1", "the recipe: expected keys that are text, found True; quote it"),
        ("seed: 2026-01-02", "seed: expected text, a number, a list or a mapping, found datetime.date(2026, 1, 2)"),
        (
            "text: {tokenizer: !!binary aGk=}",
            "text.tokenizer: expected text, a number, a list or a",
        ),
        ("evaluate: [{prompts: [a, !!set {b}]}]", "evaluate.0.prompts.1: expected text, a number"),
        ('seed: "\\ud800"', "seed: expected text, found half a character in '\\ud800'"),
        ("text: &text {tokenizer: *text}", "the recipe: a YAML alias refers to a value that contains it"),
    ],
)
def test_what_yaml_can_say_and_a_recipe_cannot(text, message):
    with pytest.raises(RequestError) as caught:
        recipes.from_dict(recipes.read_yaml(text))
    assert str(caught.value).startswith(message)


def test_further_errors_are_counted():
    assert refused(("seeed", 1), ("train.num_steps", 0)).endswith("(and 1 more)")


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return path


def test_a_file_is_read(recipe_file):
    assert recipes.load(recipe_file) == recipes.from_dict(BASE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train: [1", "expected YAML"),
        (b"\xff\xfe\xff", "expected YAML"),
        (b"- 1\n- 2\n", "expected a mapping of settings, found list"),
        (b"", "found NoneType"),
        (b"train: !!python/object/apply:os.getcwd []", "expected YAML"),
    ],
)
def test_files_that_are_no_recipe(recipe_file, content, message):
    recipe_file.write_bytes(content)
    with pytest.raises(RequestError, match=message) as caught:
        recipes.load(recipe_file)
    assert "\n" not in str(caught.value) and str(recipe_file) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("seed: 1\ntrain:\n  num_steps: 3\nseed: 2\n", "the key 'seed' on line 4 and on line 1"),
        ("train:\n  num_steps: 3\n  log_every: 2\n  num_steps: 3\n", "the key 'num_steps' on line 4 and on line 2"),
        ("tasks:\n  a: {weight: 1, weight: 2}\n", "the key 'weight' on line 2 and on line 2"),
    ],
)
def test_a_key_that_stands_twice(recipe_file, text, found):
    recipe_file.write_text(text)
    with pytest.raises(RequestError) as caught:
        recipes.load(recipe_file)
    assert str(caught.value) == f"--config {recipe_file}: expected YAML: found {found}; remove one"


def test_no_file(tmp_path):
    with pytest.raises(RequestError, match=r"--config .*none\.yaml: no such file"):
        recipes.load(tmp_path / "none.yaml")
    with pytest.raises(RequestError, match=r"--config .*: expected a YAML file, found a folder"):
        recipes.load(tmp_path)


def test_overrides(recipe_file):
    texts = [
        "train.num_steps=7",
        "model.moe.num_experts=2",
        "tasks.film_text.weight=0.5",
        "seed=-3",
        "data_sets.photos.classes=[cat, dog, cow]",
        "train.log_samples=true",
        "cluster.address=null",
        "train.learning_rate=5e-4",
        "train.num_steps=9",
    ]
    recipe = recipes.load(recipe_file, texts)
    assert recipe.train.num_steps == 9 and recipe.train.log_samples is True and recipe.seed == -3
    assert recipe.model.moe.num_experts == 2 and recipe.tasks["film_text"].weight == 0.5
    assert recipe.train.learning_rate == 5e-4
    assert recipe.data_sets["photos"].classes == ["cat", "dog", "cow"] and recipe.cluster.address is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.num_steps", "--set train.num_steps: expected KEY=VALUE, e.g. --set train.num_steps=100"),
        ("train.num_steps=[", "--set train.num_steps=[: the value is not YAML"),
        ("seed.x=1", "seed: Input should be a valid integer; found {'x': 1}"),
        ("train.num_steps.x=1", "--set train.num_steps.x=1: 'num_steps' is not a mapping in this recipe"),
        ("tasks.film_text.variants.0.size=64", "'variants' is not a mapping in this recipe"),
        ("train.num_step=1", "unknown key 'train.num_step'; did you mean 'train.num_steps'?"),
        ("train.num_steps=ten", "train.num_steps: "),
        ("=1", "unknown key ''"),
    ],
)
def test_overrides_that_are_wrong(recipe_file, text, message):
    with pytest.raises(RequestError) as caught:
        recipes.load(recipe_file, [text])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_classes_from_a_file(tmp_path):
    # With the mark that some editors put before UTF-8.
    (tmp_path / "classes.txt").write_text("cat\n\n  grey dog \nüber\n", encoding="utf-8-sig")
    recipe = recipes.from_dict(changed(("data_sets.photos.classes", str(tmp_path / "classes.txt"))))
    assert recipe.data_sets["photos"].classes == ["cat", "grey dog", "über"]
    assert recipe.to_dict()["data_sets"]["photos"]["classes"] == ["cat", "grey dog", "über"]


@pytest.mark.parametrize("kind", ["missing", "folder", "binary"])
def test_a_class_file_that_cannot_be_read(tmp_path, kind):
    path = tmp_path / "classes"
    if kind == "folder":
        path.mkdir()
    elif kind == "binary":
        path.write_bytes(b"\xff\xfe\x00")
    assert refused(("data_sets.photos.classes", str(path))).startswith(
        f"data_sets.photos.classes: {path} cannot be read"
    )
