"""The values that a recipe's keys take."""

import dataclasses

import pytest
import yaml

from model.config import CHOICES, MOE_CHOICES, ModelConfig, MoEConfig
from pipeline import recipe as recipes
from pipeline.data.spec import AUDIO_PRESETS, AudioSpec
from pipeline.errors import RequestError
from pipeline.recipe import specs
from pipeline.recipe.settings import ModelSettings, MoESettings
from pipeline.train.mixture.structures import structure_of
from tests.pipeline.recipe.base import changed, refused, task


def test_an_unknown_key_of_an_evaluation():
    entry = {"data_set": "photos", "kind": "classify", "modality": "image", "promts": []}
    assert "did you mean 'evaluate.0.prompts'?" in refused(("evaluate", [entry]))


@pytest.mark.parametrize("prompt", ["a photo", "a photo of a {class}", "{0} and {1}", "50% {", "{{}}"])
def test_a_prompt_without_a_place_for_the_class(prompt):
    entry = {"data_set": "photos", "kind": "zero_shot", "modality": "image", "prompts": ["a {}", prompt]}
    assert "evaluate.0.prompts: expected {} where the class goes in every prompt" in refused(("evaluate", [entry]))


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
        ("cluster.decode_cpus", [8, 4]),
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


def test_whole_numbers_are_numbers():
    recipe = recipes.from_dict(changed(("data_sets.films.video.fps", 8), ("train.learning_rate", 1), *task(weight=2)))
    assert recipe.data_sets["films"].video.fps == 8.0 and recipe.tasks["photo_classes"].weight == 2.0


def test_clips_of_an_evaluation():
    films = {"data_set": "films", "kind": "retrieval", "modality": "video", "clips": 8}
    photos = {"data_set": "photos", "kind": "classify", "modality": "image", "clips": 1}
    assert [e.clips for e in recipes.from_dict(changed(("evaluate", [films, photos]))).evaluate] == [8, 1]


@pytest.mark.parametrize(
    ("path", "value"), [("tasks.film_text.weight", float("inf")), ("train.learning_rate", float("inf"))]
)
def test_infinite_values_are_refused(path, value):
    assert refused((path, value)).startswith(path)


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


def test_a_range_of_workers_is_read_from_yaml(tmp_path):
    path = tmp_path / "pets.yaml"
    path.write_text(yaml.safe_dump(changed(("cluster", {"num_workers": [1, 4]}))))
    recipe = recipes.load(path)
    assert specs.cluster_spec(recipe).num_workers == (1, 4)
    assert recipes.from_dict(recipe.to_dict()) == recipe
