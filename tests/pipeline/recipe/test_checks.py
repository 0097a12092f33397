"""Checks of a recipe's parts against each other."""

import pytest

from pipeline import recipe as recipes
from tests.pipeline.recipe.base import BASE, CAPTIONED, DELETE, TRIPLET, changed, refused, task


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (task(data_set="photo"), "tasks.photo_classes.data_set: unknown name 'photo'; did you mean 'photos'?"),
        (task(data_set="xyz"), "unknown name 'xyz'; known: photos, films"),
        (
            task(modalities=["image", "smell"]),
            "tasks.photo_classes.modalities.1: unknown name 'smell'; known: image, video, audio, text",
        ),
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
        ({"held_out": "short"}, "evaluate.0.held_out: 'short' is not one of data_sets.photos.held_out"),
        (
            {"data_set": "films", "held_out": "middle"},
            "evaluate.0.held_out: 'middle' is not one of data_sets.films.held_out",
        ),
        ({"classes": ["cow"]}, "evaluate.0.classes: ['cow'] are not among the 2 classes of data_sets.photos"),
        ({"clips": 4}, "evaluate.0.clips: expected 1, an image has one view; found 4"),
        ({"classes": ["cat", " "]}, "evaluate.0.classes: expected a text for every class, found an empty one"),
        ({"classes": ["cat", "cat"]}, "evaluate.0.classes: expected different ones, 'cat' appears again"),
        ({"data_set": None}, "evaluate.0: expected data_set, for its held-out rows, or manifest; found neither"),
        ({"modality": "text"}, "evaluate.0.modality: expected one that comes from files"),
        ({"kind": "retrieval", "other": "sound"}, "evaluate.0.other: unknown name 'sound'"),
        (
            {"kind": "retrieval", "modality": "audio"},
            "evaluate.0: retrieval of audio needs the pair audio_text; trained are audio_vision, text_vision",
        ),
        (
            {"kind": "retrieval", "other": "video"},
            "evaluate.0: retrieval of image with video: expected two modalities with layers of their own",
        ),
        ({"clips": 0}, "evaluate.0.clips: Input should be greater than or equal to 1; found 0"),
    ],
)
def test_evaluations(entry, message):
    base = {"data_set": "photos", "kind": "classify", "modality": "image"}
    assert message in refused(("evaluate", [base | entry]))
    films = {"data_set": "films", "kind": "retrieval", "modality": "video", "held_out": "long"}
    recipes.from_dict(changed(("evaluate", [base, films])))


def test_an_evaluation_needs_a_held_out_part():
    entry = {"data_set": "photos", "kind": "classify", "modality": "image"}
    message = refused(("evaluate", [entry]), ("data_sets.photos.held_out", DELETE))
    assert message == "evaluate.0: data_sets.photos.held_out is not set, so there is nothing to measure on"


def test_an_evaluation_that_no_task_can_serve_is_refused_before_training():
    """No task here trains texts with sounds; a run must not find that out after its last step."""
    entry = {"data_set": "films", "kind": "zero_shot", "modality": "audio"}
    assert "zero_shot" in refused(("evaluate", [entry]))


@pytest.mark.parametrize(
    "entry",
    [
        # Photos have no text task: films do, and the layers are the same.
        {"data_set": "photos", "kind": "zero_shot", "modality": "image", "classes": ["a cow"]},
        {"manifest": "anywhere.parquet", "kind": "retrieval", "modality": "image"},
        {"manifest": "anywhere.parquet", "kind": "retrieval", "modality": "image", "other": "audio", "clips": 2},
        {"manifest": "anywhere.parquet", "kind": "knn", "modality": "audio", "fit": "labelled.parquet"},
    ],
)
def test_an_evaluation_needs_the_heads_alone(entry):
    assert len(recipes.from_dict(changed(("evaluate", [entry]))).evaluate) == 1


def test_classes_and_prompts_come_from_files(tmp_path):
    for name, text in (("classes", "a cow\n\n a hen \n"), ("prompts", "a photo of {}\n")):
        (tmp_path / name).write_text(text)
    entry = {"data_set": "photos", "kind": "zero_shot", "modality": "image"}
    files = {name: str(tmp_path / name) for name in ("classes", "prompts")}
    (found,) = recipes.from_dict(changed(("evaluate", [entry | files]))).evaluate
    assert (found.classes, found.prompts) == (["a cow", "a hen"], ["a photo of {}"])
    (tmp_path / "classes").write_text("\n")
    assert "evaluate.0.classes: " in refused(("evaluate", [entry | files]))


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


def test_a_class_named_twice_is_refused():
    assert "cat" in refused(("data_sets.photos.classes", ["cat", "dog", "cat"]))


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


def test_a_classifier_serves_its_own_modality_alone():
    changes = [
        ("data_sets.films.classes", ["cat", "dog"]),
        *task("film_sound", objective={"nce": 1.0, "softmax": 1.0}),
    ]
    recipes.from_dict(changed(*changes, ("evaluate", [{"data_set": "films", "kind": "classify", "modality": "video"}])))
    message = refused(*changes, ("evaluate", [{"data_set": "films", "kind": "classify", "modality": "audio"}]))
    assert message == (
        "evaluate.0: classify of audio on films needs a classifier; trained are films (video), photos (image)"
    )


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
            "model.moe.num_selected: only the router tokens_choose uses it; found experts_choose",
        ),
        ([("model.moe.batch_priority", True)], "model.moe.batch_priority: only the router tokens_choose uses it"),
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
        ("film_text", GAIN, "augment.sound: applies only to sound; found modalities ['video', 'text']"),
        ("film_sound", {"augment": {"sound": {"gain_db": [6, -6]}}}, "sound.gain_db: expected [low, high], rising"),
        ("film_sound", {"augment": {"sound": {"mel_mask_share": 1.5}}}, "sound.mel_mask_share"),
        ("photo_classes", {"augment": {"colour": {"hue": 0.6}}}, "colour.hue"),
    ],
)
def test_colours_and_sounds_where_words_or_media_forbid_them(key, changes, message):
    classes = [("data_sets.photos.classes", ["cat", "red apple"]), ("data_sets.films.classes", ["loud horn", "bell"])]
    assert message in refused(*classes, *[(f"tasks.{key}.{name}", value) for name, value in changes.items()])
