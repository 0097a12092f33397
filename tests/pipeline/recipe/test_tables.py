"""Tokens are those of the recipe's model: its patches, its position tables."""

import numpy as np
import pytest

from model.config import NO_VOCABULARY, VARIANTS
from model.imp import Imp
from pipeline import recipe as recipes
from pipeline.data.batches import SampleMaker
from pipeline.data.media.clip import Clip
from pipeline.data.sample_tokens import View
from pipeline.data.spec import AudioSpec, TokenSpec
from pipeline.recipe import specs
from pipeline.train.mixture.structures import structure_of
from tests.pipeline.recipe.base import changed, refused, task

OTHER = {"vision_patch": (8, 16, 16), "vision_positions": (4, 8, 8), "audio_patch": (8, 32), "audio_positions": (16, 4)}


@pytest.fixture
def other(monkeypatch):
    """Changes to BASE that ask for a variant of other patches and smaller tables, with inputs that fit them."""
    monkeypatch.setitem(VARIANTS, "imp-other", VARIANTS["imp-tiny"] | OTHER)
    return [
        ("model.variant", "imp-other"),
        ("model.dtype", "float32"),
        *task("photo_classes", variants=[{"size": 64}, {"size": 128}]),
        *task("film_text", variants=[{"size": 64}, {"size": 128}]),
        *task("film_sound", variants=[{"size": 128, "drop_rate": 0.75}]),
        *[(f"data_sets.{name}.video", {"short_side": 128}) for name in ("photos", "films")],
    ]


def test_another_patch_or_table_of_the_model_changes_the_tokens(other):
    recipe = recipes.from_dict(changed(*other))
    config, tokens = specs.model_config(recipe, vocab_size=NO_VOCABULARY), specs.token_spec(recipe)
    assert {name: getattr(config, name) for name in OTHER} == OTHER
    films, sound = specs.data_set_specs(recipe)["films"], specs.task_specs(recipe)["film_sound"]
    structure = structure_of(sound, sound.variants[0], films, tokens)
    assert [(i.modality, i.num_tokens, i.num_values) for i in structure.inputs] == [
        ("vision", 32, 3 * 8 * 16 * 16),
        ("audio", 16 * 4, 8 * 32),
    ]
    # The model refuses what is not its own patches, even where they divide its kernel.
    Imp.for_structures(config, [structure])
    with pytest.raises(ValueError, match="vision: the model takes tokens of 768 or 6144 values, found 3072"):
        Imp.for_structures(config, [structure_of(sound, sound.variants[0], films, TokenSpec())])


def test_the_defaults_of_the_data_layer_are_those_of_the_model():
    recipe = recipes.from_dict(changed(("model.variant", "imp-b")))
    assert specs.token_spec(recipe) == TokenSpec()
    assert specs.data_set_specs(recipe)["films"].audio == AudioSpec()


def test_samples_are_cut_into_the_models_patches(other):
    recipe = recipes.from_dict(changed(*other))
    tokens, films = specs.token_spec(recipe), specs.data_set_specs(recipe)["films"]
    sound = specs.task_specs(recipe)["film_sound"]
    maker = SampleMaker(sound, films, tokenizer=None, tokens=tokens)
    media = {"video": np.zeros((16, 128, 128, 3), np.uint8), "audio": np.zeros(films.audio.num_samples, np.float32)}
    arrays = maker.arrays(Clip("a", media), View(sound.variants[0]))
    assert arrays["vision/tokens"].shape == (2 * 8 * 8, 6144) and arrays["audio/tokens"].shape == (64, 256)
    assert arrays["vision/positions"].max(0).tolist() == [2, 7, 7]
    assert arrays["audio/positions"].max(0).tolist() == [15, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("tasks.film_text.variants", [{"size": 64, "frames": 12}]),
            "frames must divide by 8 and size by 16; found",
        ),
        (("tasks.film_text.variants", [{"size": 144}]), "grid (2, 9, 9) is larger than the position tables (4, 8, 8)"),
        (("data_sets.films.audio", {"num_mels": 80}), "data_sets.films.audio.num_mels: must divide by the patch of 32"),
        (
            ("data_sets.films.audio", {"num_frames": 136}),
            "a grid of (17, 4) patches is larger than the",
        ),
    ],
)
def test_inputs_that_another_table_cannot_hold_are_refused(other, change, message):
    assert message in refused(*other, change)
