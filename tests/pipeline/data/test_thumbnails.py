"""Pictures of tokens: the inverse of how they were cut."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from pipeline.data.spec import AudioSpec
from pipeline.data.thumbnails import image_uri, spectrum_uri, strip_uri, unpatched, unpatched_spectrum
from pipeline.data.tokens import log_mel, patchify, spectrogram_tokens
from pipeline.embed.thumbnails import _picture


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/webp;base64,"))))


def test_patches_become_the_frames_they_were_cut_from_and_dropped_ones_are_grey():
    frames = np.random.default_rng(0).integers(0, 256, (4, 8, 12, 3), np.uint8)
    tokens, places = patchify(frames, (2, 4, 4)), np.arange(12)
    np.testing.assert_array_equal(unpatched(tokens, (2, 2, 3), (2, 4, 4), places), frames)
    kept = unpatched(tokens[1:], (2, 2, 3), (2, 4, 4), places[1:])
    assert (kept[:2, :4, :4] == 128).all()
    np.testing.assert_array_equal(kept[2:], frames[2:])


def test_tokens_of_a_sound_become_its_spectrogram():
    spec = AudioSpec(frame_length=256, hop_length=128, num_frames=32, num_mels=32, mean=0.0, std=1.0)
    sound = np.sin(np.arange(spec.num_samples) * 0.3).astype(np.float32)
    shown = unpatched_spectrum(spectrogram_tokens(sound, spec), spec)
    np.testing.assert_allclose(shown, log_mel(sound, spec), atol=1e-5)


@pytest.mark.parametrize(("shape", "size"), [((64, 64), (64, 64)), ((600, 300), (56, 112)), ((1, 4000), (112, 1))])
def test_a_thumbnail_is_small_and_keeps_its_shape(shape, size):
    assert opened(image_uri(np.zeros((*shape, 3), np.uint8))).size == size


def test_a_strip_shows_at_most_eight_frames_beside_each_other():
    assert opened(strip_uri(np.zeros((100, 72, 72, 3), np.uint8))).size == (8 * 72 + 7 * 2, 72)
    assert opened(strip_uri(np.zeros((1, 72, 72, 3), np.uint8))).size == (72, 72)


def test_a_spectrogram_has_its_low_tones_at_the_bottom_and_silence_is_a_picture_too():
    values = np.zeros((16, 16), np.float32)
    values[:, 0] = 1
    picture = np.asarray(opened(spectrum_uri(values)).convert("RGB")).astype(int)
    assert picture[-2, 8].sum() > picture[1, 8].sum() + 100
    assert opened(spectrum_uri(np.zeros((16, 16), np.float32))).size == (144, 144)


def test_pictures_wider_than_their_format_allows_are_shrunk():
    assert opened(strip_uri(np.zeros((2, 8, 16_000, 3), np.uint8))).size == (16_383, 4)
    assert opened(spectrum_uri(np.zeros((20_000, 16), np.float32))).size[0] == 16_383
    image, strip, small = (
        _picture(np.zeros((*shape, 3), np.uint8), **width)
        for shape, width in (((32, 64_000), {}), ((72, 30_000), {"width": 1000}), ((32, 40), {}))
    )
    sizes = [(one.width, one.height) for one in (image, strip, small)]
    assert sizes == [(192, 1), (1000, 2), (40, 32)]
