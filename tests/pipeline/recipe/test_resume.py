"""Changes that a resume may make."""

import pytest

from pipeline import recipe as recipes
from pipeline.errors import RequestError
from tests.pipeline.recipe.base import BASE, DELETE, changed


@pytest.mark.parametrize(
    "change",
    [
        ("cluster.num_workers", 4),
        ("cluster.address", "auto"),
        ("logging.progress", "none"),
        ("checkpoint.keep_last", 9),
        ("train.num_steps", 101),
        ("cluster.expert_parallel", 2),
        ("cluster.fsdp", True),
    ],
)
def test_a_resume_may_change(change):
    recipes.check_resume(recipes.from_dict(BASE).to_dict(), recipes.from_dict(changed(change)).to_dict())


@pytest.mark.parametrize(
    ("change", "key", "old", "new"),
    [
        (("train.num_steps", 99), "train.num_steps", 100, 99),
        (("seed", 1), "seed", 0, 1),
        (("train.checkpoint_every", 10), "train.checkpoint_every", 1000, 10),
        (("model.moe.num_experts", 8), "model.moe.num_experts", 4, 8),
        (("model.heads", "per_modality"), "model.heads", "per_pair", "per_modality"),
        (("train.freeze", ["encoder"]), "train.freeze", [], ["encoder"]),
        (("model.matryoshka", [64, 128]), "model.matryoshka", [], [64, 128]),
        (
            ("data_sets.photos.classes", ["cat", "dog", "cow"]),
            "data_sets.photos.classes",
            ["cat", "dog"],
            ["cat", "dog", "cow"],
        ),
        (("data_sets.films.manifest", "/x"), "data_sets.films.manifest", "/data/films.parquet", "/x"),
        (("tasks.film_text.objective", "sigmoid_pairs"), "tasks.film_text.objective", "nce", "sigmoid_pairs"),
        (("tasks.film_text.objective", {"nce": 1.0}), "tasks.film_text.objective", "nce", {"nce": 1.0}),
    ],
)
def test_a_resume_may_not_change(change, key, old, new):
    with pytest.raises(RequestError) as caught:
        recipes.check_resume(recipes.from_dict(BASE).to_dict(), recipes.from_dict(changed(change)).to_dict())
    assert str(caught.value) == (
        f"this run directory was made with {key} = {old!r}, the recipe now says {new!r}; "
        "use another --run-dir, or set it back"
    )


def resume(*changes, allowed: bool = False) -> list[str]:
    new = changed(("resume.allow_mixture_change", True), *changes) if allowed else changed(*changes)
    return recipes.check_resume(recipes.from_dict(BASE).to_dict(), recipes.from_dict(new).to_dict())


def test_the_mixture_changes_where_it_is_allowed():
    change = ("tasks.film_text.weight", 2.0)
    with pytest.raises(RequestError, match=r"weight = None, the recipe now says 2\.0; .*allow_mixture_change=true$"):
        resume(change)
    assert resume(change, allowed=True) == ["tasks.film_text.weight: None is now 2.0"]
    assert resume(("sampler.temperature", 2.0), allowed=True) == ["sampler.temperature: 1.0 is now 2.0"]
    film = {**BASE["tasks"]["film_text"], "weight": 3.0}
    assert resume(("tasks.other", film), allowed=True) == ["tasks.other is new"]


def test_an_allowed_mixture_allows_nothing_else():
    for change in (("seed", 1), ("tasks.film_text.batch_size", 4), ("data_sets.films.manifest", "/x")):
        with pytest.raises(RequestError, match=r"or set it back$"):
            resume(change, allowed=True)


def test_a_resume_may_not_add_or_drop_a_task():
    old, new = recipes.from_dict(BASE).to_dict(), recipes.from_dict(changed(("tasks.film_sound", DELETE))).to_dict()
    for a, b in ((old, new), (new, old)):
        with pytest.raises(RequestError, match=r"made with tasks\.film_sound = "):
            recipes.check_resume(a, b)


LATER_KEYS = {
    "tasks.film_text": ("pair_weights", "microbatches"),
    "train": ("dense_update",),
    "cluster": ("expert_parallel", "fsdp"),
    "model": ("towers", "heads", "matryoshka", "attention", "scan", "contrastive_chunk"),
    "model.moe": ("placement", "router", "num_selected", "z_loss_weight", "dispatch"),
}


def test_a_run_directory_from_before_a_key_was_there_is_resumed():
    """Its recipe lacks the key, which counts as the default."""
    old = recipes.from_dict(BASE).to_dict()
    for path, keys in LATER_KEYS.items():
        node = old
        for part in path.split("."):
            node = node[part]
        for key in keys:
            del node[key]
    # What a resume may change need not even be known any more.
    old["cluster"]["gone"] = 1
    recipes.check_resume(old, recipes.from_dict(BASE).to_dict())
    new = recipes.from_dict(changed(("train.dense_update", True))).to_dict()
    with pytest.raises(RequestError, match=r"made with train\.dense_update = False, the recipe now says True"):
        recipes.check_resume(old, new)


def test_a_stored_recipe_of_an_older_version_is_read_without_settings_that_are_gone():
    stored = recipes.from_dict(BASE).to_dict()
    stored["cluster"]["queue_blocks"] = 2
    assert recipes.from_stored(stored) == recipes.from_dict(BASE)
    stored["train"]["queue_blocks"] = 2
    with pytest.raises(RequestError, match="queue_blocks"):
        recipes.from_stored(stored)


def test_a_stored_recipe_that_this_version_cannot_read_is_one_clear_line():
    new = recipes.from_dict(BASE).to_dict()
    with pytest.raises(RequestError) as caught:
        recipes.check_resume(new | {"momentum": 1}, new)
    assert str(caught.value).startswith(
        "this run directory's recipe is not one of this version: unknown key 'momentum'"
    )


def test_differences_are_listed_by_key():
    old = {"a": 1, "b": {"c": 2, "d": [1]}, "e": None}
    assert recipes.differences(old, {"a": 1, "b": {"c": 3, "d": [1]}, "f": 4}) == [("b.c", 2, 3), ("f", None, 4)]
