"""Still images: every format, transparency, sizes, and a reason for everything that is no image."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.broken_media import png
from pipeline.data.media.errors import REASONS, Reject
from pipeline.data.media.image import decode_image
from pipeline.data.spec import ImageSpec

SPEC = ImageSpec(short_side=32)


def quarters(mode: str = "RGB") -> Image.Image:
    """32 x 32 pixels: red, green, blue and white quarters."""
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
    return Image.fromarray(np.kron(colours, np.ones((16, 16, 1), np.uint8))).convert(mode)


def save(path: Path, image: Image.Image, **options) -> str:
    image.save(path, **options)
    return str(path)


def reject(path, spec: ImageSpec = SPEC) -> Reject:
    with pytest.raises(Reject) as caught:
        decode_image(str(path), spec)
    assert caught.value.reason in REASONS and caught.value.detail
    return caught.value


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is and has almost no pixels."""

    return png(width, height, b"\0" * 100)


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("a.png", {}, 0),
        ("a.gif", {}, 0),
        ("a.webp", {"lossless": True}, 0),
        ("a.jpg", {"quality": 95, "subsampling": 0}, 12),
        ("a.webp", {"quality": 95}, 30),
    ],
)
def test_formats(tmp_path, name, options, tolerance):
    found = decode_image(save(tmp_path / name, quarters(), **options), SPEC)
    assert found.shape == (32, 32, 3) and found.dtype == np.uint8
    inner = np.s_[[4, 4, 28, 28], [4, 28, 4, 28]]
    assert np.abs(found[inner].astype(int) - np.asarray(quarters())[inner]).max() <= tolerance


def test_the_name_does_not_decide_the_format(tmp_path):
    path = save(tmp_path / "a.bin", quarters(), format="PNG")
    assert (decode_image(path, SPEC) == np.asarray(quarters())).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    image = Image.new("L", (32, 32), 255).convert(mode)
    path = save(tmp_path / "a.jpg" if mode == "CMYK" else tmp_path / "a.png", image)
    assert decode_image(path, SPEC).min() >= 254


def test_sixteen_bit_grey_keeps_its_brightness(tmp_path):
    values = np.linspace(0, 65535, 32).astype(np.uint16)
    path = save(tmp_path / "a.png", Image.fromarray(np.tile(values, (32, 1))))
    assert np.abs(decode_image(path, SPEC)[0, :, 0].astype(int) - np.rint(values / 257)).max() <= 1


def test_transparency_is_laid_over_white(tmp_path):
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:, 8:16] = (0, 0, 0, 255)
    pixels[:, 16:] = (200, 0, 0, 128)
    found = decode_image(save(tmp_path / "a.png", Image.fromarray(pixels, "RGBA")), SPEC)
    # 255 + (200 - 255) 128/255 = 227.4; 255 - 255 128/255 = 127.
    assert found[0, 0].tolist() == [255, 255, 255] and found[0, 10].tolist() == [0, 0, 0]
    assert np.abs(found[0, 20].astype(int) - [227, 127, 127]).max() <= 1


@pytest.mark.parametrize("name", ["a.png", "a.gif"])
def test_a_transparent_colour_of_a_palette_is_white(tmp_path, name):
    image = Image.fromarray(np.repeat([[0] * 16 + [1] * 16], 32, axis=0).astype(np.uint8), "P")
    image.putpalette([0, 0, 0, 0, 0, 255])
    found = decode_image(save(tmp_path / name, image, transparency=0), SPEC)
    assert found[0, 0].tolist() == [255, 255, 255] and found[0, 31].tolist() == [0, 0, 255]


def test_an_animation_is_its_first_picture(tmp_path):
    path = tmp_path / "a.gif"
    quarters().save(path, save_all=True, append_images=[Image.new("RGB", (32, 32))], duration=100)
    assert (decode_image(str(path), SPEC) == np.asarray(quarters())).all()


@pytest.mark.parametrize(("size", "expected"), [((100, 50), (32, 64)), ((50, 100), (64, 32)), ((8, 10), (40, 32))])
def test_the_short_side_is_resized(tmp_path, size, expected):
    found = decode_image(save(tmp_path / "a.png", Image.new("RGB", size, (9, 99, 199))), SPEC)
    assert found.shape == (*expected, 3) and (found == [9, 99, 199]).all()


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif"])
def test_a_truncated_file_is_rejected(tmp_path, name):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    content = Path(save(tmp_path / name, noise)).read_bytes()
    for part in (10, len(content) // 2):
        (tmp_path / name).write_bytes(content[:part])
        assert reject(tmp_path / name).reason == "not_decodable"


def test_a_damaged_file_is_rejected(tmp_path):
    content = bytearray(Path(save(tmp_path / "a.png", quarters())).read_bytes())
    content[40:60] = bytes(20)
    (tmp_path / "a.png").write_bytes(content)
    assert reject(tmp_path / "a.png").reason == "not_decodable"


@pytest.mark.parametrize("content", [b"not an image", b"\x89PNG\r\n\x1a\n", bytes(1000), b"<svg/>"])
def test_other_bytes_are_rejected(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    assert reject(tmp_path / "a.png").reason == "not_decodable"


def test_formats_that_were_not_asked_for_are_rejected(tmp_path):
    assert reject(save(tmp_path / "a.bmp", quarters())).reason == "not_decodable"


def test_the_pixel_cap(tmp_path):
    path = save(tmp_path / "a.png", Image.new("RGB", (40, 30)))
    assert decode_image(path, ImageSpec(short_side=30, max_pixels=1200)).shape == (30, 40, 3)
    found = reject(path, ImageSpec(short_side=30, max_pixels=1199))
    assert found.reason == "too_large" and found.detail == "1200 pixels (40x30), at most 1199"


def test_a_bomb_is_too_large(tmp_path):
    """400 million pixels in a few hundred bytes: over the cap, so that is its reason."""
    (tmp_path / "a.png").write_bytes(png_header(20_000, 20_000))
    assert reject(tmp_path / "a.png").reason == "too_large"


def test_the_pixel_cap_holds_for_the_canonical_image_too(tmp_path):
    """A strip 1 pixel wide grows to short_side x short_side its length: 1000 pixels become 4 million."""
    path = save(tmp_path / "a.png", Image.new("RGB", (1, 1000)))
    assert reject(path, ImageSpec(short_side=64, max_pixels=100_000)).reason == "too_large"


def test_reasons_are_a_fixed_list():
    with pytest.raises(ValueError, match="unknown reject reason 'tired'; known: no_media"):
        Reject("tired", "x")
    assert Reject("no_text", "a\n  b\t" + "c" * 1000).detail == "a b " + "c" * 296


@pytest.mark.parametrize(
    ("orientation", "corner"), [(1, (255, 0, 0)), (3, (255, 255, 255)), (6, (0, 0, 255)), (8, (0, 255, 0))]
)
def test_photos_stand_upright_as_their_exif_data_say(tmp_path, corner, orientation):
    """Orientation 6: the camera's left lower corner (blue) is the picture's left upper one; 3 turns it by half."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode_image(save(tmp_path / "a.png", quarters(), exif=exif), SPEC)
    assert tuple(found[4, 4]) == corner


def test_a_large_jpeg_is_decoded_small_and_right(tmp_path):
    found = decode_image(save(tmp_path / "a.jpg", quarters().resize((1024, 1024), 0), quality=95), SPEC)
    assert np.abs(found.astype(int) - np.asarray(quarters(), int))[2:14, 2:14].max() <= 6


def test_a_decoder_of_ones_own(tmp_path):
    path = save(tmp_path / "a.png", quarters())
    assert (decode_image(path, ImageSpec(short_side=32, decoder="tests.decoders:grey_image")) == 7).all()
    assert reject(path, ImageSpec(decoder="tests.decoders:broken")).reason == "not_decodable"
    wrong = reject(path, ImageSpec(decoder="tests.decoders:wrong_type"))
    assert wrong.reason == "not_decodable" and "float64 of shape (2,)" in wrong.detail
    with pytest.raises(ValueError, match=r"expected one of pillow or package\.module:function, found 'none'"):
        decode_image(path, ImageSpec(decoder="none"))
