"""Recipes: what is refused and how it is said, overrides, resolved values, and what a resume may change."""

import copy
import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from model import objectives
from model.config import CHOICES, MOE_CHOICES, ModelConfig, MoEConfig, from_variant
from pipeline import recipe as recipes
from pipeline.data import spec
from pipeline.data.spec import AUDIO_PRESETS, AudioSpec, Augment
from pipeline.errors import RequestError
from pipeline.recipe import specs
from pipeline.recipe.settings import EvaluationSettings, ModelSettings, MoESettings
from pipeline.train.mixture.structures import structure_of

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
DELETE = object()
BASE = {
    "data_sets": {
        "photos": {
            "manifest": "/data/photos.parquet",
            "held_out": "/data/photos_test.parquet",
            "classes": ["cat", "dog"],
        },
        "films": {"manifest": "/data/films.parquet", "held_out": {"short": "/data/short.parquet", "long": "s3://b/l"}},
    },
    "tasks": {
        "photo_classes": {
            "data_set": "photos",
            "objective": "softmax",
            "modalities": ["image"],
            "batch_size": 64,
            "variants": [{"size": 256}, {"size": 512}, {"size": 512, "drop_rate": 0.75}],
        },
        "film_text": {
            "data_set": "films",
            "objective": "nce",
            "modalities": ["video", "text"],
            "batch_size": 64,
            "variants": [{"size": 128}, {"size": 256}],
        },
        "film_sound": {
            "data_set": "films",
            "objective": "nce",
            "modalities": ["video", "audio"],
            "batch_size": 32,
            "variants": [{"size": 256, "drop_rate": 0.75}],
        },
    },
    "train": {"num_steps": 100},
}


def changed(*changes: tuple[str, object]) -> dict:
    """BASE with values set at dotted paths; DELETE takes a key away."""
    raw = copy.deepcopy(BASE)
    for path, value in changes:
        *outer, last = path.split(".")
        node = raw
        for part in outer:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        last = int(last) if isinstance(node, list) else last
        if value is DELETE:
            del node[last]
        else:
            node[last] = value
    return raw


def refused(*changes: tuple[str, object]) -> str:
    with pytest.raises(RequestError) as caught:
        recipes.from_dict(changed(*changes))
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def task(name: str = "photo_classes", **fields) -> list[tuple[str, object]]:
    return [(f"tasks.{name}.{key}", value) for key, value in fields.items()]


# --- keys and values ---


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
        ("cluster.xyz", "unknown key 'cluster.xyz'; known: num_workers, max_failures, stall_timeout_s, accelerator"),
    ],
)
def test_an_unknown_key_names_the_nearest(path, message):
    assert message in refused((path, 1))


def test_an_unknown_key_of_an_evaluation():
    entry = {"data_set": "photos", "kind": "classify", "modality": "image", "promts": []}
    assert "did you mean 'evaluate.0.prompts'?" in refused(("evaluate", [entry]))


@pytest.mark.parametrize("prompt", ["a photo", "a photo of a {class}", "{0} and {1}", "50% {", "{{}}"])
def test_a_prompt_without_a_place_for_the_class(prompt):
    entry = {"data_set": "photos", "kind": "zero_shot", "modality": "image", "prompts": ["a {}", prompt]}
    assert "evaluate.0.prompts: expected {} where the class goes in every prompt" in refused(("evaluate", [entry]))


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
        ("evaluate", [5], "evaluate.0: expected settings such as evaluate.0.data_set=..., found 5"),
        ("tasks.film_text.pair_weights", 3, "tasks.film_text.pair_weights: expected a mapping, found 3"),
        ("data_sets.films.held_out", 3, "data_sets.films.held_out: Input should be a valid string; found 3"),
    ],
)
def test_a_value_where_settings_belong(path, value, message):
    assert refused((path, value)).startswith(message)


def test_further_errors_are_counted():
    assert refused(("seeed", 1), ("train.num_steps", 0)).endswith("(and 1 more)")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", "0"),
        ("seed", 1.5),
        ("train.num_steps", 0),
        ("train.num_steps", True),
        ("train.learning_rate", 0),
        ("train.learning_rate", "1e-3"),
        ("train.warmup_fraction", 1.0),
        ("train.pre_warmup_fraction", 0.95),
        ("train.b1", 1.0),
        ("train.b2", -0.1),
        ("train.eps", 0.0),
        ("train.weight_decay", -1e-4),
        ("train.initial_learning_rate", -1e-6),
        ("train.pre_warmup_learning_rate", -1e-6),
        ("model.text_embedding_std", 0.0),
        ("max_reject_fraction", 1.5),
        ("tasks.film_text.batch_size", 0),
        ("tasks.film_text.weight", -1),
        ("tasks.film_text.objective", "mse"),
        ("tasks.film_text.objective", None),
        ("tasks.film_text.objective", ["nce"]),
        ("tasks.film_text.objective", {}),
        ("tasks.film_text.objective", {"nce": 0}),
        ("tasks.film_text.objective", {"nce": -1.0}),
        ("tasks.film_text.objective", {"nce": True}),
        ("tasks.film_text.objective", {"nce": "1"}),
        ("tasks.film_text.objective", {"nce": float("inf")}),
        ("tasks.film_text.objective", {"nce": 1.0, "mse": 1.0}),
        ("tasks.film_text.pair_weights.text_vision", -1),
        ("tasks.film_text.microbatches", 0),
        ("train.dense_update", 1),
        ("cluster.expert_parallel", 0),
        ("cluster.fsdp", "yes"),
        ("model.towers", "two"),
        ("model.attention", "flash"),
        ("model.remat", "some"),
        ("model.scan", 1),
        ("model.contrastive_chunk", 0),
        ("model.moe.router", "best"),
        ("model.moe.num_selected", 0),
        ("model.moe.z_loss_weight", -0.1),
        ("model.moe.route_padding", "no"),
        ("tasks.film_text.modalities", []),
        ("tasks.film_text.modalities.1", "smell"),
        ("tasks.film_text.variants.0.drop_rate", 1.0),
        ("data_sets.films.video.fps", 0.0),
        ("data_sets.films.schemes", "ftp"),
        ("tasks", {}),
        ("cluster.num_workers", -1),
        ("text.vocab_size", 8),
        ("text.max_characters", 0),
        ("text.max_characters", 1e5),
        ("logging.progress", "loud"),
        ("logging.writers", "wandb"),
        ("logging.profile_steps", [5, 3]),
        ("logging.peak_tflops", 0.0),
        ("train", None),
        ("tasks.photo_classes.augment.area", 0.5),
        ("data_sets.photos.manifest", None),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_was_found(path, value):
    message = refused((path, value))
    assert message.startswith(path) and f"found {value!r}"[:20] in message


@pytest.mark.parametrize(("key", "value", "found"), [("writers", ["comet"], "'comet'"), ("profile_steps", [0, 3], "0")])
def test_a_wrong_entry_of_logging_is_named(key, value, found):
    message = refused((f"logging.{key}", value))
    assert message.startswith(f"logging.{key}.0: ") and message.endswith(f"found {found}")


def test_schemes_reach_the_data_set_and_are_names():
    found = specs.data_set_specs(recipes.from_dict(changed(("data_sets.photos.schemes", ["ftp", "zip"]))))
    assert found["photos"].schemes == ("ftp", "zip") and found["films"].schemes == ()
    assert refused(("data_sets.photos.schemes", ["ftp://"])).startswith("data_sets.photos.schemes.0: ")


def test_whole_numbers_are_numbers():
    recipe = recipes.from_dict(changed(("data_sets.films.video.fps", 8), ("train.learning_rate", 1), *task(weight=2)))
    assert recipe.data_sets["films"].video.fps == 8.0 and recipe.tasks["photo_classes"].weight == 2.0


# --- what one part says of another ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (task(data_set="photo"), "tasks.photo_classes.data_set: unknown name 'photo'; did you mean 'photos'?"),
        (task(data_set="xyz"), "unknown name 'xyz'; known: photos, films"),
        (task("film_text", modalities=["video", "video"]), "expected different ones, and image or video, not both"),
        (task("film_text", modalities=["video", "image"]), "expected different ones, and image or video, not both"),
        (task("film_text", modalities=["text"]), "tasks.film_text.modalities: nce needs two or three, found ['text']"),
        (task(modalities=["image", "text"]), "softmax needs one of image, video, audio; found ['image', 'text']"),
        (task(modalities=["text"]), "softmax needs one of image, video, audio; found ['text']"),
        (task(objective="sigmoid", modalities=["text"]), "sigmoid needs one of image, video, audio"),
        (
            task(data_set="films", modalities=["video"]),
            "tasks.photo_classes: softmax needs data_sets.films.classes, found none",
        ),
        (
            task(classes=["cat", "cow"]),
            "tasks.photo_classes.classes: ['cow'] are not among the 2 classes of data_sets.photos",
        ),
        (
            [("data_sets.films.video", {"max_frames": 8})],
            "tasks.film_text.variants: 16 frames, but data_sets.films.video.max_frames is 8; raise it",
        ),
        (
            [("data_sets.films.audio", {"num_frames": 100})],
            "data_sets.films.audio.num_frames: must divide by the patch of 16",
        ),
        (
            [("data_sets.films.audio", {"num_mels": 40})],
            "data_sets.films.audio.num_mels: must divide by the patch of 16",
        ),
        (
            [(f"tasks.{name}.weight", 0) for name in BASE["tasks"]],
            "tasks: every weight is 0, so no task would ever run; give one a positive weight",
        ),
        (task(variants=[]), "tasks.photo_classes.variants: expected at least one {size: ...} for images or video"),
        (
            task(variants=[{"size": 250}]),
            "tasks.photo_classes.variants: variant 250x250: frames must divide by 4 and size by 16",
        ),
        (
            task(batch_size=7, variants=[{"size": 256}, {"size": 512}]),
            "tasks.photo_classes.variants: variant 512x512: a batch of 1 has 1024 of the 1792 vision tokens of",
        ),
        (task(variants=[{"size": 1024}]), "grid (1, 64, 64) is larger than the position tables (16, 32, 32)"),
        (task("film_text", variants=[{"size": 128, "frames": 6}]), "found 6 and 128"),
    ],
)
def test_references_and_tasks(changes, message):
    assert message in refused(*changes)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"data_set": "photo"}, "evaluate.0.data_set: unknown name 'photo'; did you mean 'photos'?"),
        ({"held_out": "short"}, "evaluate.0.held_out: 'short' is none of data_sets.photos.held_out"),
        (
            {"data_set": "films", "held_out": "middle"},
            "evaluate.0.held_out: 'middle' is none of data_sets.films.held_out",
        ),
        ({"classes": ["cow"]}, "evaluate.0.classes: ['cow'] are not among the 2 classes of data_sets.photos"),
        ({"clips": 4}, "evaluate.0.clips: expected 1, an image has one view; found 4"),
        ({"clips": 0}, "evaluate.0.clips: Input should be greater than or equal to 1; found 0"),
    ],
)
def test_evaluations(entry, message):
    base = {"data_set": "photos", "kind": "classify", "modality": "image"}
    assert message in refused(("evaluate", [base | entry]))
    films = {"data_set": "films", "kind": "retrieval", "modality": "video", "held_out": "long"}
    recipes.from_dict(changed(("evaluate", [base, films])))


def test_clips_of_an_evaluation():
    films = {"data_set": "films", "kind": "retrieval", "modality": "video", "clips": 8}
    photos = {"data_set": "photos", "kind": "classify", "modality": "image", "clips": 1}
    assert [e.clips for e in recipes.from_dict(changed(("evaluate", [films, photos]))).evaluate] == [8, 1]


def test_an_evaluation_needs_a_held_out_part():
    entry = {"data_set": "photos", "kind": "classify", "modality": "image"}
    message = refused(("evaluate", [entry]), ("data_sets.photos.held_out", DELETE))
    assert message == "evaluate.0: data_sets.photos.held_out is not set, so there is nothing to measure on"


def test_an_evaluation_that_no_task_can_serve_is_refused_before_training():
    """No task here trains a text side for photos; a run must not find that out after its last step."""
    entry = {"data_set": "photos", "kind": "zero_shot", "modality": "image"}
    assert "zero_shot" in refused(("evaluate", [entry]))


def test_an_unknown_model_variant_is_refused_before_anything_starts():
    assert "imp-tiny" in refused(("model.variant", "imp-tinny"))


def test_experts_of_a_dense_model_are_refused_before_anything_starts():
    assert "dense" in refused(("model.variant", "imp-s"), ("model.moe.num_experts", 4))


def test_text_longer_than_the_position_table_is_refused():
    """imp-tiny-moe has 512 text positions."""
    recipes.from_dict(changed(*task("film_text", text_length=512)))
    assert "text_length" in refused(*task("film_text", text_length=513))


@pytest.mark.parametrize("audio", [{"num_frames": 1040}, {"num_mels": 144}])
def test_spectrograms_larger_than_the_position_tables_are_refused(audio):
    """65 time patches for 64 rows, 9 frequency patches for 8."""
    assert "audio" in refused(("data_sets.films.audio", audio))


def test_captions_cannot_tell_positives_where_there_is_no_text():
    """Every sample would have the empty caption, and so be a positive of every other."""
    assert "positives" in refused(*task("film_sound", positives="text"))


@pytest.mark.parametrize(
    "augment",
    [{"area": [1.0, 0.5]}, {"area": [0.0, 1.0]}, {"area": [-1.0, 1.0]}, {"area": [0.5, 2.0]}, {"aspect": [0.0, 1.0]}],
)
def test_impossible_crops_are_refused(augment):
    assert "augment" in refused(*task(augment=augment))


@pytest.mark.parametrize(
    ("name", "settings", "key"),
    [
        ("photo_classes", {"variants": [{"size": 64, "frames": 16}]}, "variants"),
        ("film_text", {"modalities": ["audio", "text"]}, "variants"),
        ("film_text", {"modalities": ["audio", "text"], "variants": [], "augment": {"flip": True}}, "augment.flip"),
        ("photo_classes", {"augment": {"sound": {"gain_db": [-6, 6]}}}, "augment.sound"),
    ],
)
def test_settings_that_a_task_would_ignore_are_refused(name, settings, key):
    assert refused(*task(name, **settings)).startswith(f"tasks.{name}.{key}: ")


@pytest.mark.parametrize(
    ("path", "value"), [("tasks.film_text.weight", float("inf")), ("train.learning_rate", float("inf"))]
)
def test_infinite_values_are_refused(path, value):
    assert refused((path, value)).startswith(path)


def test_a_class_named_twice_is_refused():
    assert "cat" in refused(("data_sets.photos.classes", ["cat", "dog", "cat"]))


# --- objectives ---


def test_names_of_objectives_are_those_of_the_model():
    assert tuple(objectives.CONTRASTIVE) == spec.CONTRASTIVE
    assert tuple(objectives.CLASSIFICATION) == spec.CLASSIFICATION


CAPTIONED = {"modalities": ["image", "text"], "objective": {"softmax": 0.5, "nce": 2}}
TRIPLET = {"modalities": ["video", "audio", "text"]}


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            task(objective={"nce": 1.0, "softmax": 1.0}),
            "tasks.photo_classes.modalities: nce needs two or three, found ['image']",
        ),
        (task(objective="sigmoid_pairs"), "sigmoid_pairs needs two or three, found ['image']"),
        (
            task("film_text", objective={"nce": 1.0, "sigmoid": 1.0}),
            "tasks.film_text: sigmoid needs data_sets.films.classes, found none",
        ),
        (
            task(objective={"softmax": 1.0, "sigmoid": 1.0}, modalities=["image", "text"]),
            "tasks.photo_classes.modalities: softmax needs one of image, video, audio; found ['image', 'text']",
        ),
        (
            task("film_text", **TRIPLET, pair_weights={"vision_text": 0.5}),
            "tasks.film_text.pair_weights: the task's pairs are audio_text, audio_vision, text_vision; "
            "found ['vision_text']",
        ),
        (
            task("film_text", pair_weights={"audio_text": 0.0}),
            "tasks.film_text.pair_weights: the task's pairs are text_vision; found ['audio_text']",
        ),
        (
            task(pair_weights={"text_vision": 1.0}),
            "tasks.photo_classes.pair_weights: the task's pairs are none, since nothing is compared; "
            "found ['text_vision']",
        ),
        (
            task("film_text", pair_weights={"text_vision": 0.0}),
            "tasks.film_text.pair_weights: every pair has the weight 0, so nothing would be compared",
        ),
        (
            task("film_text", microbatches=2),
            "tasks.film_text.microbatches: contrastive losses compare the whole batch; expected 1, found 2",
        ),
        (
            task(**CAPTIONED, microbatches=4),
            "tasks.photo_classes.microbatches: contrastive losses compare the whole batch; expected 1, found 4",
        ),
        (
            # 64 samples at 256 pixels, 16 at 512.
            task(microbatches=32),
            "tasks.photo_classes.microbatches: 32 do not divide the batch of 16 of variant 512x512",
        ),
        (
            task(microbatches=3),
            "tasks.photo_classes.microbatches: 3 do not divide the batch of 64 of variant 256x256",
        ),
    ],
)
def test_losses_that_cannot_be(changes, message):
    assert message in refused(*changes)


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
    assert specs.serves(found, EvaluationSettings(data_set=found.data_set, kind=kind, modality=modality)) == served


def test_a_classifier_serves_its_own_modality_alone():
    changes = [
        ("data_sets.films.classes", ["cat", "dog"]),
        *task("film_sound", objective={"nce": 1.0, "softmax": 1.0}),
    ]
    recipes.from_dict(changed(*changes, ("evaluate", [{"data_set": "films", "kind": "classify", "modality": "video"}])))
    message = refused(*changes, ("evaluate", [{"data_set": "films", "kind": "classify", "modality": "audio"}]))
    assert message == (
        "evaluate.0: classify of audio on films needs a task there with a classifier of audio; the recipe has none"
    )


# --- the model and the cluster ---


def literals(settings, name: str) -> set:
    """The values that a setting takes, null aside."""
    values = set()
    for part in (settings.model_fields[name].annotation, *settings.model_fields[name].annotation.__args__):
        values |= {v for v in getattr(part, "__args__", ()) if isinstance(v, str)}
    return values


def test_settings_of_the_model_take_the_models_values():
    for settings, choices in ((ModelSettings, CHOICES), (MoESettings, MOE_CHOICES)):
        for name, values in choices.items():
            assert literals(settings, name) == set(values), name


def test_settings_of_the_model_are_the_models_fields():
    assert set(MoESettings.model_fields) == {f.name for f in dataclasses.fields(MoEConfig)}
    assert set(ModelSettings.model_fields) - {"variant"} <= {f.name for f in dataclasses.fields(ModelConfig)}


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            [("cluster.expert_parallel", 3)],
            "cluster.expert_parallel: 3 devices cannot share 4 experts in equal parts",
        ),
        (
            [("cluster.expert_parallel", 2), ("model.variant", "imp-tiny")],
            "cluster.expert_parallel: 2 devices cannot share a dense model in equal parts",
        ),
        (
            [("model.moe.num_selected", 2)],
            "model.moe.num_selected: is for the router tokens_choose; found experts_choose",
        ),
        ([("model.moe.batch_priority", True)], "model.moe.batch_priority: is for the router tokens_choose"),
        (
            [("model.moe.router", "tokens_choose"), ("model.moe.num_selected", 5)],
            "model: moe.num_selected 5 must be from 1 to num_experts 4",
        ),
        (
            [("model.moe.placement", "interleaved"), ("model.moe.num_layers", 2)],
            "model: interleaved placement needs a depth that moe.num_layers divides, found depth 3 and",
        ),
    ],
)
def test_models_that_cannot_be(changes, message):
    assert message in refused(*changes)


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


# --- files and overrides ---


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


def test_a_merge_key_may_be_replaced():
    assert recipes.read_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")["b"] == {"x": 3, "y": 2}


def test_no_file(tmp_path):
    with pytest.raises(RequestError, match=r"--config .*none\.yaml: no such file"):
        recipes.load(tmp_path / "none.yaml")
    with pytest.raises(RequestError, match="--config"):
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
    (tmp_path / "classes.txt").write_text("cat\n\n  grey dog \nüber\n", encoding="utf-8")
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


# --- what comes out ---


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


def audio_of(**settings) -> AudioSpec:
    return specs.data_set_specs(recipes.from_dict(changed(("data_sets.films.audio", settings))))["films"].audio


def test_the_audio_preset_of_audiomae():
    assert audio_of() == audio_of(preset="imp") == AUDIO_PRESETS["imp"]
    audio = audio_of(preset="audiomae")
    assert audio == AUDIO_PRESETS["audiomae"] and audio.grid == (64, 8)
    recipe = recipes.from_dict(changed(("data_sets.films.audio", {"preset": "audiomae"})))
    task, data_set = specs.task_specs(recipe)["film_sound"], specs.data_set_specs(recipe)["films"]
    sound = structure_of(task, task.variants[0], data_set, specs.token_spec(recipe)).inputs[1]
    assert (sound.modality, sound.num_tokens, sound.num_values) == ("audio", 512, 256)


def test_explicit_settings_replace_the_presets():
    changes = {"num_frames": 512, "mean": -6.627, "std": 10.716, "pad_value": None, "log_floor": 1e-5}
    assert audio_of(preset="audiomae", **changes) == dataclasses.replace(AUDIO_PRESETS["audiomae"], **changes)
    # Also back to what is the default of the other preset.
    assert audio_of(preset="audiomae", hop_length=1024).hop_length == 1024


def test_a_resolved_preset_loads_again(tmp_path):
    recipe = recipes.from_dict(changed(("data_sets.films.audio", {"preset": "audiomae", "num_frames": 512})))
    path = tmp_path / "config.yaml"
    path.write_text(recipes.dump(recipe.to_dict()), encoding="utf-8")
    again = recipes.load(path)
    assert again == recipe and specs.data_set_specs(again) == specs.data_set_specs(recipe)
    stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert stored["data_sets"]["films"]["audio"]["std"] == 2 * 4.5689974
    recipes.check_resume(stored, recipe.to_dict())
    other = recipes.from_dict(changed(("data_sets.films.audio", {"num_frames": 512})))
    with pytest.raises(RequestError, match=r"data_sets\.films\.audio\."):
        recipes.check_resume(stored, other.to_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "vatt"}, "data_sets.films.audio.preset: Input should be 'imp' or 'audiomae'; found 'vatt'"),
        ({"preset": ["imp"]}, "data_sets.films.audio.preset: Input should be 'imp' or 'audiomae'"),
        ({"mel_scale": "bark"}, "data_sets.films.audio.mel_scale: Input should be 'slaney' or 'htk'; found 'bark'"),
        ({"power": 3}, "data_sets.films.audio.power: Input should be 1 or 2; found 3"),
        (
            {"preset": "audiomae", "frame_length": 800},
            "data_sets.films.audio: fft_length 512 is shorter than frame_length 800",
        ),
        ({"sample_rate_hz": 8000}, "data_sets.films.audio: expected min_hz < max_hz <= sample_rate_hz / 2; found 80, "),
        ({"log_offset": 0.0}, "data_sets.films.audio: log_offset and log_floor are both 0"),
        (
            {"preset": "audiomae", "num_frames": 1040},
            "data_sets.films.audio: a grid of (65, 8) patches is larger than the position tables (64, 8)",
        ),
    ],
)
def test_impossible_audio_settings(settings, message):
    assert message in refused(("data_sets.films.audio", settings))


@pytest.mark.parametrize(
    ("key", "changes", "message"),
    [
        ("film_text", {"augment": {"flip": True}}, "captions may say left or right"),
        ("photo_classes", {"augment": {"flip": True}}, "the class 'turn Left' would be wrong in the mirror"),
    ],
)
def test_flips_where_words_may_tell_the_sides(key, changes, message):
    classes = ("data_sets.photos.classes", ["cat", "dog", "turn Left", "leftover"])
    assert message in refused(classes, *[(f"tasks.{key}.{name}", value) for name, value in changes.items()])


COLOUR = {"augment": {"colour": {"probability": 0.8}}}
GAIN = {"augment": {"sound": {"gain_db": [-6, 6]}}}


@pytest.mark.parametrize(
    ("key", "changes", "message"),
    [
        ("photo_classes", COLOUR, "augment.colour: the class 'red apple' would be wrong in other colours"),
        ("photo_classes", {**COLOUR, "classes": ["red apple"]}, "augment.colour: the class 'red apple'"),
        ("film_sound", {**GAIN, "classes": ["loud horn"]}, "augment.sound: the class 'loud horn' would be wrong at"),
        ("film_text", GAIN, "augment.sound: is for sound; found modalities ['video', 'text']"),
        ("film_sound", {"augment": {"sound": {"gain_db": [6, -6]}}}, "sound.gain_db: expected [low, high], rising"),
        ("film_sound", {"augment": {"sound": {"mel_mask_share": 1.5}}}, "sound.mel_mask_share"),
        ("photo_classes", {"augment": {"colour": {"hue": 0.6}}}, "colour.hue"),
    ],
)
def test_colours_and_sounds_where_words_or_media_forbid_them(key, changes, message):
    classes = [("data_sets.photos.classes", ["cat", "red apple"]), ("data_sets.films.classes", ["loud horn", "bell"])]
    assert message in refused(*classes, *[(f"tasks.{key}.{name}", value) for name, value in changes.items()])


def test_colours_and_sounds_come_out_resolved():
    """Captions that name a colour are found sample by sample, so that others may change theirs."""
    changes = task("film_text", **COLOUR) + task(
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


# --- what follows from the batch ---


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


# --- resume ---


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
    "model": ("towers", "attention", "scan", "contrastive_chunk"),
    "model.moe": ("placement", "router", "num_selected", "z_loss_weight", "dispatch"),
}


def test_a_run_directory_from_before_a_key_was_there_is_resumed():
    """Its recipe lacks the key: that stands for the default."""
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
