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
        ("a.bmp", {}, 0),
        ("a.dib", {}, 0),
        ("a.tiff", {}, 0),
        ("a.tif", {"compression": "tiff_lzw"}, 0),
        ("a.ppm", {}, 0),
        ("a.jp2", {}, 0),
        ("a.ico", {"sizes": [(32, 32)]}, 0),
        ("a.pcx", {}, 0),
        ("a.sgi", {}, 0),
        ("a.avif", {"quality": 95, "subsampling": "4:4:4"}, 12),
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


@pytest.mark.parametrize("name", ["a.tiff", "a.pgm", "a.jp2"])
def test_sixteen_bit_grey_of_other_formats(tmp_path, name):
    """Half of white is grey 127 or 128 of 255."""
    path = save(tmp_path / name, Image.fromarray(np.full((32, 32), 32_767, np.uint16)))
    assert np.abs(decode_image(path, SPEC).astype(int) - 127).max() <= 1


def test_sixteen_bit_colour(tmp_path):
    """Red 0x8000, green 0xffff, blue 0x0100 in each pixel of a PNG."""
    rows = (b"\0" + b"\x80\0\xff\xff\x01\0" * 32) * 32
    (tmp_path / "a.png").write_bytes(png(32, 32, rows, depth=16))
    assert (decode_image(str(tmp_path / "a.png"), SPEC) == [128, 255, 1]).all()


@pytest.mark.parametrize("values", [np.float32([[0.5]]), np.int32([[70_000]])])
def test_measurements_are_no_pictures(tmp_path, values):
    """A file of floating-point or 32-bit values does not define white."""
    found = reject(save(tmp_path / "a.tiff", Image.fromarray(np.tile(values, (32, 32)))))
    assert found.reason == "not_decodable" and "32 bits a channel (TIFF)" in found.detail


def test_grey_with_transparency(tmp_path):
    pixels = np.zeros((32, 32, 2), np.uint8)
    pixels[:, 16:] = (100, 255)
    found = decode_image(save(tmp_path / "a.png", Image.fromarray(pixels, "LA")), SPEC)
    assert (found[:, :16] == 255).all() and (found[:, 16:] == 100).all()


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


@pytest.mark.parametrize("name", ["a.eps", "a.pdf", "a.tga", "a.im"])
def test_formats_that_run_programs_or_are_rare_are_rejected(tmp_path, name):
    found = reject(save(tmp_path / name, quarters()))
    assert found.reason == "not_decodable" and found.detail.startswith("Pillow: damaged, or none of JPEG, PNG")


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
