"""Colours and sounds in training: values by hand, draws that leave all others alone, and words that are left true."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.augment import (
    change_colour,
    change_waveform,
    for_words,
    jitter_colour,
    mask_spectrogram,
    start_sample,
    stream,
)
from pipeline.data.batches import SampleMaker
from pipeline.data.media.clip import Clip
from pipeline.data.sample_tokens import View
from pipeline.data.spec import AudioSpec, Augment, ColourJitter, SoundAugment, TokenSpec, Variant, VideoSpec
from pipeline.data.tokens import spectrogram_tokens

SETTINGS = settings(max_examples=40, deadline=None)
AS_IT_IS = {"brightness": 0.0, "saturation": 1.0, "contrast": 1.0, "turn": 0.0}
EVERYTHING = Augment(
    colour=ColourJitter(probability=1.0),
    sound=SoundAugment(random_start=True, gain_db=(-6, 6), noise_probability=1.0, time_masks=2, mel_masks=2),
)


def noise_frames(seed: int = 0, shape: tuple[int, ...] = (4, 16, 16)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def changed(pixels: list, **change) -> list:
    return change_colour(np.array(pixels, np.uint8)[None], **AS_IT_IS | change)[0].tolist()


# --- colours ---


def test_nothing_changed_gives_the_same_pixels():
    frames = noise_frames()
    assert (change_colour(frames, **AS_IT_IS) == frames).all()


@pytest.mark.parametrize(
    ("pixels", "change", "wanted"),
    [
        ([[0, 100, 250]], {"brightness": 0.2}, [[51, 151, 255]]),
        ([[0, 100, 250]], {"brightness": -0.2}, [[0, 49, 199]]),
        # The mean of each channel is 100.
        ([[50, 80, 100], [150, 120, 100]], {"contrast": 0.5}, [[75, 90, 100], [125, 110, 100]]),
        ([[50, 80, 100], [150, 120, 100]], {"contrast": 1.5}, [[25, 70, 100], [175, 130, 100]]),
        # Luma of red 0.213 x 200 = 42.6, of blue 0.072 x 200 = 14.4.
        ([[200, 0, 0], [0, 0, 200]], {"saturation": 0.0}, [[43, 43, 43], [14, 14, 14]]),
        # Half way to grey: 42.6 + (200 - 42.6) / 2 and 42.6 / 2.
        ([[200, 0, 0]], {"saturation": 0.5}, [[121, 21, 21]]),
        # Chroma turned by half a circle: 2 x 42.6 - 200 and 2 x 42.6.
        ([[200, 0, 0]], {"turn": math.pi}, [[0, 85, 85]]),
        # By a quarter: 42.6 + 200 x (-0.213, 0.143, -0.787).
        ([[200, 0, 0]], {"turn": math.pi / 2}, [[0, 71, 0]]),
        ([[90, 90, 90]], {"turn": 1.0, "saturation": 1.4}, [[90, 90, 90]]),
    ],
)
def test_colours_by_hand(pixels, change, wanted):
    assert changed(pixels, **change) == wanted


def test_contrast_is_about_the_mean_of_the_clip():
    """Two frames of one grey each: about its own mean a frame would not change."""
    frames = np.stack([np.full((8, 8, 3), 50, np.uint8), np.full((8, 8, 3), 150, np.uint8)])
    out = change_colour(frames, **AS_IT_IS | {"contrast": 0.5})
    assert (out[0] == 75).all() and (out[1] == 125).all()


@given(
    seed=st.integers(0, 10**6),
    brightness=st.floats(-1, 1),
    saturation=st.floats(0, 2),
    contrast=st.floats(0, 2),
    turn=st.floats(-math.pi, math.pi),
)
@SETTINGS
def test_colours_equal_those_of_floating_point(seed, brightness, saturation, contrast, turn):
    """Step by step in float64, as the release orders it, within the rounding of the pixels."""
    frames = noise_frames(seed, (2, 8, 8))
    luma, cos, sin = np.array([0.213, 0.715, 0.072]), math.cos(turn), math.sin(turn)
    grey = np.ones((3, 1)) * luma
    hue = grey + cos * (np.eye(3) - grey)
    hue += sin * np.array([[-0.213, -0.715, 0.928], [0.143, 0.140, -0.283], [-0.787, 0.715, 0.072]])
    x = frames.astype(np.float64) + 255 * brightness
    x = x @ (grey + saturation * (np.eye(3) - grey)).T
    mean = x.reshape(-1, 3).mean(0)
    x = (mean + contrast * (x - mean)) @ hue.T
    found = change_colour(frames, brightness=brightness, saturation=saturation, contrast=contrast, turn=turn)
    assert found.dtype == np.uint8 and found.shape == frames.shape
    assert np.abs(np.clip(x, 0, 255) - found).max() < 0.6


def test_all_frames_of_a_clip_change_alike_and_most_clips_do():
    frame, touched = noise_frames(shape=(8, 8)), 0
    for seed in range(300):
        frames = np.stack([frame] * 3)
        out = jitter_colour(frames, ColourJitter(probability=0.8), np.random.default_rng(seed))
        assert (out == out[0]).all()
        touched += (out != frames).any()
    # 240 on average, standard deviation 7.
    assert 210 < touched < 270


# --- sounds ---


def test_gain_by_hand():
    wave = np.array([0.5, -0.25], np.float32)
    out = change_waveform(wave, SoundAugment(gain_db=(-20.0, -20.0)), np.random.default_rng(0))
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, [0.05, -0.025], rtol=1e-6)


def test_noise_is_so_many_decibels_below_the_sound():
    wave = np.tile(np.array([0.5, -0.5], np.float32), 50_000)
    sound = SoundAugment(noise_probability=1.0, noise_snr_db=(20.0, 20.0))
    added = change_waveform(wave, sound, np.random.default_rng(0)) - wave
    assert added.std() == pytest.approx(0.05, rel=0.02) and abs(added.mean()) < 1e-3


def test_silence_stays_silent():
    out = change_waveform(np.zeros(100, np.float32), EVERYTHING.sound, np.random.default_rng(0))
    assert not out.any() and out.dtype == np.float32


def test_a_start_is_anywhere_in_what_is_to_spare():
    sound = SoundAugment(random_start=True)
    starts = [start_sample(3, sound, np.random.default_rng(s)) for s in range(200)]
    assert np.bincount(starts, minlength=4).min() > 30 and max(starts) == 3
    assert start_sample(3, SoundAugment(), np.random.default_rng(0)) == 0


@given(
    seed=st.integers(0, 10**6),
    time_masks=st.integers(0, 3),
    mel_masks=st.integers(0, 3),
    share=st.floats(0, 1),
)
@SETTINGS
def test_masks_are_whole_bands_of_the_mean(seed, time_masks, mel_masks, share):
    audio = AudioSpec(num_frames=64, num_mels=32)
    tokens = np.random.default_rng(seed).standard_normal((8, 256)).astype(np.float32)
    out = tokens.copy()
    sound = SoundAugment(time_masks=time_masks, mel_masks=mel_masks, time_mask_share=share, mel_mask_share=share)
    mask_spectrogram(out, audio, sound, np.random.default_rng(seed))
    # (time patch, mel patch, frame, mel) → (frames, mels)
    changed = (out != tokens).reshape(4, 2, 16, 16).transpose(0, 2, 1, 3).reshape(64, 32)
    frames, mels = changed.all(1), changed.all(0)
    assert (changed == (frames[:, None] | mels[None])).all()
    assert frames.sum() <= time_masks * share * 64 or mels.all()
    assert mels.sum() <= mel_masks * share * 32 or frames.all()
    mean = np.float32(tokens.astype(np.float64).mean())
    assert (np.abs(out[out != tokens] - mean) <= 1e-6).all()


# --- samples ---


def sounding_clip(seed: int = 0) -> Clip:
    """Sixteen frames and three seconds of noise."""
    rng = np.random.default_rng(seed)
    sound = rng.standard_normal(48_000).astype(np.float32) / 10
    return Clip("x", {"video": noise_frames(seed, (16, 32, 32)), "audio": sound}, text=("a cat", "the dog", "fox"))


VARIANT = Variant("8x32x32-drop0.5", 4, num_frames=8, size=32, drop_rate=0.5, grid=(2, 2, 2), num_vision_tokens=4)


def arrays(make_data_set, make_task, tokenizer, *, augment, rng, modalities=("video", "text"), text=("a cat", "fox")):
    data_set = make_data_set(video=VideoSpec(fps=8.0, short_side=32, max_frames=16))
    task = make_task(
        objective="nce",
        modalities=modalities,
        variants=(VARIANT,),
        positives="instance",
        augment=augment,
        text_length=8,
    )
    maker = SampleMaker(task, data_set, tokenizer=tokenizer, tokens=TokenSpec())
    return maker.arrays(dataclasses.replace(sounding_clip(), text=text), View(VARIANT, rng=rng))


def test_a_branch_leaves_the_generator_as_it_is():
    rng, other = np.random.default_rng(0), np.random.default_rng(0)
    branches = [stream(rng, n).random(4).tolist() for n in (1, 2, 1)]
    assert branches[0] == branches[2] != branches[1] and rng.random() == other.random()


@pytest.mark.parametrize("seed", range(5))
def test_colours_and_sounds_change_no_other_draw(make_data_set, make_task, tokenizer, seed):
    """Window, dropped tokens and caption are those without augmentation."""

    def made(augment):
        rng = np.random.Generator(np.random.Philox(key=seed))
        modalities = ("video", "audio", "text")
        return arrays(make_data_set, make_task, tokenizer, augment=augment, rng=rng, modalities=modalities)

    plain, other, again = made(Augment()), made(EVERYTHING), made(EVERYTHING)
    for name in plain:
        assert (other[name] == again[name]).all(), name
        assert (plain[name] == other[name]).all() == (name not in ("vision/tokens", "audio/tokens")), name
    # The frames fix where the sound begins, so that only its loudness and its masks differ.
    dim = dataclasses.replace(EVERYTHING, colour=ColourJitter(probability=1.0, hue=0, contrast=0, saturation=0))
    shift = made(dim)["vision/tokens"].astype(int) - plain["vision/tokens"]
    inside = (plain["vision/tokens"] > 40) & (plain["vision/tokens"] < 215)
    assert len(set(shift[inside].tolist())) == 1


def test_frames_fix_where_the_sound_begins(make_data_set, make_task, tokenizer):
    start = Augment(sound=SoundAugment(random_start=True))
    for modalities, alike in ((("video", "audio"), True), (("audio", "text"), False)):
        made = [
            arrays(make_data_set, make_task, tokenizer, augment=a, rng=np.random.default_rng(2), modalities=modalities)
            for a in (Augment(), start)
        ]
        assert (made[0]["audio/tokens"] == made[1]["audio/tokens"]).all() == alike


def test_evaluation_changes_nothing(make_data_set, make_task, tokenizer):
    """Not a bit, whatever training does."""
    for modalities in (("video", "audio", "text"), ("audio", "text")):
        plain, other = (
            arrays(make_data_set, make_task, tokenizer, augment=a, rng=None, modalities=modalities)
            for a in (Augment(), EVERYTHING)
        )
        assert all((plain[name] == other[name]).all() for name in plain)
    data_set = make_data_set()
    assert (plain["audio/tokens"] == spectrogram_tokens(sounding_clip().media["audio"], data_set.audio)).all()


@pytest.mark.parametrize(
    ("words", "colour", "loudness"),
    [
        (("a cat",), True, True),
        (("a Red car", "a car"), False, True),
        (("skies of grey",), False, True),
        (("medium-dark skin tone",), False, True),
        (("a quiet street",), True, False),
        (("a loud blue truck",), False, False),
        # Parts of other words.
        (("a redwood, a goldfish, cloudy",), True, True),
        ((), True, True),
    ],
)
def test_words_that_would_become_wrong(words, colour, loudness):
    found = for_words(EVERYTHING, words)
    assert bool(found.colour.probability) == colour
    quiet = dataclasses.replace(EVERYTHING.sound, gain_db=(0.0, 0.0), noise_probability=0.0)
    assert found.sound == (EVERYTHING.sound if loudness else quiet)


def test_a_caption_that_names_a_colour_keeps_its_colours(make_data_set, make_task, tokenizer):
    rng = np.random.default_rng
    told, plain = (
        arrays(make_data_set, make_task, tokenizer, augment=a, rng=rng(1), text=("a red cat",))
        for a in (EVERYTHING, Augment())
    )
    assert (told["vision/tokens"] == plain["vision/tokens"]).all()
