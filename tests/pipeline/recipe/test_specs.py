"""From a recipe to plain data."""

import dataclasses

import pytest

from model.config import MoEConfig, from_variant
from pipeline import recipe as recipes
from pipeline.data import spec
from pipeline.data.modalities import EMBEDDERS
from pipeline.data.spec import AudioSpec, Augment
from pipeline.recipe import specs
from pipeline.recipe.measurable import missing_head
from pipeline.recipe.settings import EvaluationSettings
from pipeline.train.mixture.structures import structure_of
from tests.pipeline.recipe.base import BASE, CAPTIONED, DEMO, TRIPLET, changed, refused, task


def test_schemes_reach_the_data_set_and_are_names():
    found = specs.data_set_specs(recipes.from_dict(changed(("data_sets.photos.schemes", ["ftp", "zip"]))))
    assert found["photos"].schemes == ("ftp", "zip") and found["films"].schemes == ()
    assert refused(("data_sets.photos.schemes", ["ftp://"])).startswith("data_sets.photos.schemes.0: ")


def test_a_weighted_sum_stays_what_the_user_wrote():
    recipe = recipes.from_dict(changed(*task(**CAPTIONED)))
    assert recipe.to_dict()["tasks"]["photo_classes"]["objective"] == {"softmax": 0.5, "nce": 2.0}
    assert recipe.to_dict()["tasks"]["film_text"]["objective"] == "nce"
    found = specs.task_specs(recipe)
    assert found["photo_classes"].objectives == (("nce", 2.0), ("softmax", 0.5))
    assert found["film_text"].objectives == (("nce", 1.0),)
    photo, film = found["photo_classes"], found["film_text"]
    assert (photo.contrasts, photo.classifies, photo.classified) == (True, True, "image")
    assert (film.contrasts, film.classifies, film.classified) == (True, False, None)
    assert recipes.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("modalities", "classified"),
    [(["text", "audio", "video"], "audio"), (["video", "audio"], "video"), (["text", "video"], "video")],
)
def test_a_classifier_looks_at_the_first_modality_that_is_not_text(modalities, classified):
    fields = {"modalities": modalities, "objective": {"sigmoid_pairs": 1.0, "sigmoid": 1.0}}
    changes = [("data_sets.films.classes", ["cat", "dog"]), *task("film_text", **fields)]
    assert specs.task_specs(recipes.from_dict(changed(*changes)))["film_text"].classified == classified


def test_pair_weights_and_microbatches_come_out_resolved():
    weights = {"text_vision": 2, "audio_text": 0.0}
    recipe = recipes.from_dict(changed(*task("film_text", **TRIPLET, pair_weights=weights), *task(microbatches=16)))
    found = specs.task_specs(recipe)
    assert found["film_text"].pair_weights == (("audio_text", 0.0), ("text_vision", 2.0))
    assert found["film_text"].pairs == ("audio_text", "audio_vision", "text_vision")
    assert (found["photo_classes"].microbatches, found["film_text"].microbatches) == (16, 1)
    assert found["photo_classes"].pair_weights == found["photo_classes"].pairs == ()


@pytest.mark.parametrize(
    ("name", "fields", "kind", "modality", "served"),
    [
        ("photo_classes", {}, "classify", "image", True),
        ("photo_classes", {}, "zero_shot", "image", False),
        ("photo_classes", {"objective": "sigmoid"}, "classify", "image", True),
        ("photo_classes", {"weight": 0.0}, "classify", "image", False),
        ("photo_classes", CAPTIONED, "classify", "image", True),
        ("photo_classes", CAPTIONED, "zero_shot", "image", True),
        ("film_text", {}, "retrieval", "video", True),
        ("film_text", {"objective": "sigmoid_pairs"}, "retrieval", "video", True),
        ("film_text", {}, "classify", "video", False),
        ("film_sound", {}, "retrieval", "video", False),
        ("film_text", TRIPLET, "retrieval", "audio", True),
        ("film_text", TRIPLET | {"pair_weights": {"audio_text": 0.0}}, "retrieval", "audio", False),
        ("film_text", TRIPLET | {"pair_weights": {"audio_text": 0.0}}, "retrieval", "video", True),
        ("film_text", TRIPLET | {"pair_weights": {"audio_text": 0.5}}, "retrieval", "audio", True),
    ],
)
def test_which_task_serves_a_measurement(name, fields, kind, modality, served):
    found = specs.task_specs(recipes.from_dict(changed(*task(name, **fields))))[name]
    entry = EvaluationSettings(data_set=found.data_set, kind=kind, modality=modality)
    assert (missing_head(entry, [found], EMBEDDERS) is None) == served


def test_every_setting_of_the_model_reaches_it():
    model = {
        "towers": "per_modality",
        "attention": "xla",
        "remat": "attention",
        "scan": False,
        "contrastive_chunk": 64,
        "moe": {
            "num_experts": 6,
            "num_layers": 1,
            "capacity_factor": 1.5,
            "placement": "interleaved",
            "router": "tokens_choose",
            "num_selected": 2,
            "batch_priority": True,
            "load_balance_weight": 0.01,
            "z_loss_weight": 0.001,
            "group": "tokens",
            "group_size": 512,
            "route_padding": True,
            "dispatch": "einsum",
        },
    }
    found = specs.model_config(recipes.from_dict(changed(("model", model))), vocab_size=16)
    tiny = from_variant("imp-tiny-moe", vocab_size=16, dtype="auto", temperature_init=0.1)
    fields = {name: value for name, value in model.items() if name != "moe"}
    assert found == dataclasses.replace(tiny, **fields, moe=MoEConfig(**model["moe"]))
    assert specs.model_config(recipes.from_dict(BASE), vocab_size=16) == tiny


def test_the_releases_optimizer_can_be_asked_for():
    values = {"b1": 0.8, "b2": 0.99, "eps": 1e-6, "weight_decay": 1e-4, "initial_learning_rate": 5e-6}
    values |= {"pre_warmup_learning_rate": 2e-5}
    changes = [(f"train.{name}", value) for name, value in values.items()]
    optimizer = specs.optimizer_config(recipes.from_dict(changed(*changes, ("train.pre_warmup_fraction", 0.1))))
    assert {name: getattr(optimizer, name) for name in values} == values
    assert (optimizer.pre_warmup_steps, optimizer.warmup_steps) == (10, 5)
    model = specs.model_config(recipes.from_dict(changed(("model.text_embedding_std", 0.1))), vocab_size=77)
    assert model.text_embedding_std == 0.1


def test_a_recipes_own_optimizer_is_the_papers():
    optimizer = specs.optimizer_config(recipes.from_dict(BASE))
    assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.999, 1e-7)
    assert (optimizer.weight_decay, optimizer.initial_learning_rate, optimizer.pre_warmup_steps) == (0.0, 0.0, 0)


def test_dense_updates_reach_the_optimizer():
    assert specs.optimizer_config(recipes.from_dict(changed(("train.dense_update", True)))).dense_update
    assert not specs.optimizer_config(recipes.from_dict(BASE)).dense_update


def test_data_sets_come_out_resolved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = [("data_sets.photos.manifest", "sub/m.parquet"), ("data_sets.photos.max_reject_fraction", 0.5)]
    found = specs.data_set_specs(recipes.from_dict(changed(*changes, ("data_sets.films.audio", {"hop_length": 512}))))
    photos, films = found["photos"], found["films"]
    assert photos.manifest == f"{tmp_path}/sub/m.parquet" and photos.held_out == {
        "held_out": "/data/photos_test.parquet"
    }
    assert films.held_out == {"short": "/data/short.parquet", "long": "s3://b/l"}
    assert (photos.max_reject_fraction, films.max_reject_fraction) == (0.5, 0.05)
    assert photos.classes == ("cat", "dog") and films.audio == AudioSpec(hop_length=512) and films.shards is None


def test_colours_and_sounds_come_out_resolved():
    """Captions that name a colour are found sample by sample, so that others may change theirs."""
    changes = task("film_text", augment={"colour": {"probability": 0.8}}) + task(
        "film_sound", augment={"sound": {"random_start": True, "time_masks": 1}}
    )
    found = specs.task_specs(recipes.from_dict(changed(*changes)))
    assert found["film_text"].augment.colour == spec.ColourJitter(0.8, 0.125, 0.4, 0.4, 0.2)
    assert found["film_sound"].augment.sound == spec.SoundAugment(random_start=True, time_masks=1)
    assert found["photo_classes"].augment == Augment()


def test_tasks_come_out_resolved():
    changes = task(augment={"area": [0.5, 1], "flip": True}, classes=["dog"])
    found = specs.task_specs(recipes.from_dict(changed(*changes)))
    photo = found["photo_classes"]
    assert [(v.name, v.global_batch_size) for v in photo.variants] == [
        ("256x256", 64),
        ("512x512", 16),
        ("512x512-drop0.75", 64),
    ]
    assert photo.augment == Augment(area=(0.5, 1.0), flip=True) and photo.classes == ("dog",) and photo.weight is None
    # Half resolution first: 256 tokens a clip, then 1024.
    assert [(v.name, v.global_batch_size) for v in found["film_text"].variants] == [
        ("16x128x128", 64),
        ("16x256x256", 16),
    ]
    assert found["film_sound"].variants[0].num_vision_tokens == 256


def test_the_longest_text_reaches_every_task():
    for changes, wanted in (((), 100_000), ((("text.max_characters", 300),), 300)):
        found = specs.task_specs(recipes.from_dict(changed(*changes)))
        assert {task.max_characters for task in found.values()} == {wanted}


def test_audio_has_one_variant():
    changes = task("sound", data_set="photos", objective="softmax", modalities=["audio"], batch_size=24)
    (variant,) = specs.task_specs(recipes.from_dict(changed(*changes)))["sound"].variants
    assert (variant.name, variant.global_batch_size, variant.num_vision_tokens) == ("all", 24, 0)


def test_optimizer_and_model():
    recipe = recipes.from_dict(
        changed(
            ("train.warmup_fraction", 0.1),
            ("train.learning_rate", 1e-3),
            ("model.moe.num_experts", 8),
            ("model.remat", "none"),
            ("model.temperature_init", 1.0),
        )
    )
    optimizer = specs.optimizer_config(recipe)
    assert (optimizer.warmup_steps, optimizer.num_steps, optimizer.peak_learning_rate) == (10, 100, 1e-3)
    assert specs.optimizer_config(recipes.from_dict(changed(("train.num_steps", 1)))).warmup_steps == 1
    model = specs.model_config(recipe, vocab_size=77)
    tiny = from_variant("imp-tiny-moe")
    experts = dataclasses.replace(tiny.moe, num_experts=8)
    assert model == dataclasses.replace(tiny, vocab_size=77, moe=experts, remat="none", dtype="auto")


def test_demo_paths_lie_in_the_cache(monkeypatch, tmp_path):
    from pipeline.data import demo

    assert specs.locate("demo:digits/train.parquet") == str(demo.cache_dir() / "digits/train.parquet")
    assert specs.locate("s3://bucket/x") == "s3://bucket/x" and specs.locate("/abs") == "/abs"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert specs.locate("~/x.parquet") == f"{tmp_path}/x.parquet"
    assert specs.uses_demo(recipes.load(DEMO)) and not specs.uses_demo(recipes.from_dict(BASE))


def test_the_demo_recipe_resolves():
    recipe = recipes.load(DEMO)
    tasks, data_sets = specs.task_specs(recipe), specs.data_set_specs(recipe)
    assert set(data_sets) == {"digits", "emoji", "moving"} and len(tasks) == 8
    assert specs.model_config(recipe, vocab_size=1000).moe is not None
    for one in tasks.values():
        budgets = {v.global_batch_size * v.num_vision_tokens for v in one.variants}
        assert len(budgets) == 1, one.name


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            {"from_shards": False, "on_cluster": False, "clip_cache_mb": 0},
            "decode films once (python jobs/preprocess.py) and set its shards, or use a machine or a cluster with more "
            "CPUs, or raise cluster.clip_cache_mb (0) if the clips fit into memory, or raise cluster.decode_ahead if "
            "CPUs are idle",
        ),
        (
            {"from_shards": True, "on_cluster": True, "clip_cache_mb": 0},
            "add decode CPUs to the cluster, or raise cluster.decode_ahead if CPUs are idle",
        ),
    ],
)
def test_advice_fits_the_run(found, expected):
    assert specs.feed_advice("films", **found) == expected


@pytest.mark.parametrize("model", [{}, {"towers": "per_modality", "heads": "per_modality"}])
def test_the_groups_of_a_task_are_those_of_its_graph(model):
    fields = {"pair_weights": {"audio_text": 0.0}, "objective": "sigmoid_pairs"}
    settings = [(f"model.{key}", value) for key, value in model.items()]
    recipe = recipes.from_dict(changed(*settings, *task("film_text", **TRIPLET, **fields), *task(**CAPTIONED)))
    config, tokens = specs.model_config(recipe, vocab_size=16), specs.token_spec(recipe)
    data_sets = specs.data_set_specs(recipe)
    for one in specs.task_specs(recipe).values():
        structure = structure_of(one, one.variants[0], data_sets[one.data_set], tokens)
        assert set(specs.task_groups(one, config)) == set(structure.groups(config))


def test_frozen_groups_and_their_rates_reach_the_optimizer():
    settings = [("train.freeze", ["encoder", "embed"]), ("train.learning_rate_scales", {"pair": 0.5, "classifier": 2})]
    found = specs.optimizer_config(recipes.from_dict(changed(*settings)))
    assert found.freeze == ("encoder", "embed")
    assert found.learning_rate_scales == (("classifier", 2.0), ("pair", 0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("train.freeze", ["decoder"]),
            "train.freeze: 'decoder' means no group of parameters; known: encoder, embed_v",
        ),
        (("train.learning_rate_scales", {"embed_x": 2.0}), "train.learning_rate_scales: 'embed_x' means no group of"),
        (("train.learning_rate_scales", {"embed": 0.0}), "train.learning_rate_scales.embed: "),
        (
            ("train.freeze", ["encoder", "embed", "classifier"]),
            "train.freeze: tasks.photo_classes trains encoder, embed_vision, classifier_photos, and all of them are f",
        ),
    ],
)
def test_names_of_groups_are_checked(change, message):
    assert refused(change).startswith(message)
