"""Every key explained: the schema, the generated pages, ``--explain``."""

import collections
import json

import jsonschema
import pytest
import yaml

from pipeline import recipe as recipes
from pipeline.cli import main
from pipeline.errors import RequestError
from pipeline.recipe import schema
from pipeline.recipe.explain import explain
from pipeline.recipe.reference import COMMAND, ROOT, pages
from tests.pipeline.recipe.base import BASE, changed

CONFIGS = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "tests" / "golden").glob("*.yaml")])
KEYS = {
    ".".join([*path, name]): node
    for path, section in schema.sections()
    for name, node in schema.keys_of(section).items()
}


def test_every_key_says_what_it_means():
    few = {key: node.get("description") for key, node in KEYS.items() if len(node.get("description", "").split()) < 4}
    assert not few and len(KEYS) > 150
    # Of a section that a key holds, key and section may say the same.
    meanings = collections.Counter(node["description"] for node in KEYS.values())
    assert [text for text, count in meanings.items() if count > 1] == []
    assert not [key for key, node in KEYS.items() if "``" in node["description"] or "\n" in node["description"]]


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_what_is_committed_is_what_the_keys_say(path):
    assert path.read_text(encoding="utf-8") == pages()[path], f"keys have changed: run {COMMAND}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_recipes_are_valid_by_the_schema(path):
    check(yaml.safe_load(path.read_text(encoding="utf-8")))


def check(recipe: dict) -> None:
    jsonschema.Draft202012Validator(json.loads(pages()[ROOT / "configs" / "recipe.schema.json"])).validate(recipe)


def test_a_recipe_of_every_kind_of_value_is_valid_by_the_schema():
    check(BASE)
    check(
        changed(
            ("cluster.num_workers", [1, 4]),
            ("tasks.film_text.objective", {"nce": 1.0, "softmax": 0.5}),
            ("tasks.film_text.augment", {"area": [0.5, 1.0], "sound": {"gain_db": [-6, 6]}}),
            ("logging.profile_steps", [3, 5]),
            ("init.from", "runs/other"),
            ("sampler.stages", [{"from_step": 10, "weights": {"film_text": 2}}]),
        )
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.num_stepz", 3),
        ("data_sets.films.video.fpz", 8),
        ("tasks.film_text.augment.sound.gain", 1),
        ("train.num_steps", 0),
        ("train.clip_norm", "1"),
        ("data_sets.films.audio.power", 3),
        ("tasks.film_text.objective", "mse"),
        ("tasks.film_text.objective", {"nce": 0}),
        ("cluster.num_workers", [1, 2, 3]),
        ("sampler.kind", "random"),
    ],
)
def test_the_schema_and_the_reader_refuse_the_same(key, value):
    with pytest.raises(jsonschema.ValidationError):
        check(changed((key, value)))
    with pytest.raises(RequestError):
        recipes.from_dict(changed((key, value)))


def test_a_key_is_explained():
    assert explain("train.clip_norm", recipe=recipes.from_dict(BASE).to_dict()).splitlines() == [
        "train.clip_norm: number above 0 or null",
        "  Maximum global norm of the gradient, larger ones are scaled; null follows the largest batch.",
        "  default: null, which follows the batch: 0.1 up to 64 samples, rising to 1 at 65,536",
        "  in this recipe: 0.1",
    ]


@pytest.mark.parametrize(
    ("key", "first"),
    [
        ("tasks.batch_size", "tasks.NAME.batch_size: whole number from 1"),
        ("tasks.variants.size", "tasks.NAME.variants.0.size: whole number from 1"),
        ("tasks.film_text.variants.1.size", "tasks.film_text.variants.1.size: whole number from 1"),
        ("data_sets.audio.window", "data_sets.NAME.audio.window: periodic or symmetric"),
        (
            "cluster.num_workers",
            "cluster.num_workers: whole number from 0 or [whole number from 1, whole number from 1]",
        ),
        ("sampler.intervals", "sampler.intervals: {name: whole number from 1}"),
        ("text.max_characters", "text.max_characters: whole number from 1 to 1,000,000"),
        (
            "tasks.film_text.objective",
            "tasks.film_text.objective: nce, sigmoid_pairs, softmax, sigmoid or {name: number above 0}",
        ),
        ("train", "train: Steps and the optimiser."),
        ("evaluate", "evaluate.0: One measurement of held-out rows: those of a data set, or of any manifest."),
        ("", "A whole run: data sets, tasks, the model, its training and its evaluation."),
    ],
)
def test_the_first_line_of_an_explanation(key, first):
    assert explain(key).splitlines()[0] == first


def test_a_value_is_shown_where_the_recipe_has_it():
    recipe = recipes.from_dict(BASE).to_dict()
    assert explain("tasks.photo_classes.variants.2.drop_rate", recipe=recipe).endswith("\n  in this recipe: 0.75")
    assert "in this recipe" not in explain("tasks.photo_classes.variants.3.drop_rate", recipe=recipe)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("train.clipnorm", "--explain: unknown key 'train.clipnorm'; did you mean 'train.clip_norm'?"),
        ("clip_norm", "--explain: unknown key 'clip_norm'; did you mean 'train.clip_norm'?"),
        ("trian", "--explain: unknown key 'trian'; did you mean 'train'?"),
        ("tasks.a.batchsize", "did you mean 'tasks.a.batch_size'?"),
        ("train.num_steps.x", "--explain: unknown key 'train.num_steps.x'; known: none, it has no keys"),
        ("resume.zzz", "--explain: unknown key 'resume.zzz'; known: allow_mixture_change"),
    ],
)
def test_an_unknown_key_to_explain_names_the_nearest(key, message):
    with pytest.raises(RequestError) as caught:
        explain(key)
    assert message in str(caught.value)


def test_the_job_explains(capsys, tmp_path):
    assert main(["pretrain", "--explain", "train.num_steps"]) == 0
    assert capsys.readouterr().out.endswith("  default: required\n  in this recipe: 1650\n")
    # Also beside a recipe that cannot be read.
    assert main(["pretrain", "--config", str(tmp_path / "none.yaml"), "--explain", "train.num_steps"]) == 0
    assert "in this recipe" not in capsys.readouterr().out
    assert main(["pretrain", "--explain", "train.num_step"]) == 2
    assert (
        capsys.readouterr().err == "error: --explain: unknown key 'train.num_step'; did you mean 'train.num_steps'?\n"
    )
