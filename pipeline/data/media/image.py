"""Still images by Pillow."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.data.media.decoders import as_file, check_array, check_cap, run
from pipeline.data.media.errors import Reject
from pipeline.data.media.part import Part
from pipeline.data.spec import ImageSpec

# Formats that Pillow may detect. It knows others that run programs (EPS), are documents, or match nearly any bytes
# (TGA).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "PCX", "QOI", "SGI")
# The recipe's cap on pixels is checked before decoding and replaces Pillow's own.
Image.MAX_IMAGE_PIXELS = None


def decode(source: str | bytes, spec: ImageSpec, part: Part) -> np.ndarray:
    """``decode_image``, as ``modalities`` calls it: an image has no times."""
    return decode_image(source, spec)


def decode_image(source: str | bytes, spec: ImageSpec) -> np.ndarray:
    """(H, W, 3) uint8, the short side ``spec.short_side`` pixels, rotated as its EXIF data say."""
    pixels = run(spec.decoder, source, spec, built_in=BUILT_IN, start_s=0.0, end_s=None)
    pixels = check_array(pixels, dtype=np.uint8, ndim=3, what="uint8 (H, W, 3)")
    return np.asarray(resize_short_side(Image.fromarray(pixels), spec.short_side))


def _read_pillow(source: str | bytes, spec: ImageSpec, *, start_s: float, end_s: float | None) -> np.ndarray:
    """The first picture of the file, already at its canonical size. Transparent pixels are blended with white."""
    try:
        opened = Image.open(as_file(source), formats=FORMATS)
    except UnidentifiedImageError as e:
        raise Reject("not_decodable", f"Pillow: damaged, or none of {', '.join(FORMATS)}") from e
    with opened as image:
        target = _check_size(image.size, spec)
        # Large JPEGs are decoded at a half, a quarter or an eighth of their size; other formats ignore this.
        image.draft(image.mode, (2 * target[0], 2 * target[1]))
        return canonical_pixels(image, spec)


def _check_size(size: tuple[int, int], spec: ImageSpec) -> tuple[int, int]:
    """The canonical (width, height). Raises Reject beyond the cap, before or after resizing."""
    target = canonical_size(size, spec.short_side)
    for width, height in (size, target):
        check_cap(width * height, spec.max_pixels, reason="too_large", what=f"pixels ({width}x{height})")
    return target


def canonical_pixels(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """(H, W, 3) uint8 of an open image, the short side ``spec.short_side`` pixels."""
    _check_size(image.size, spec)
    return np.asarray(resize_short_side(_upright(_to_rgb(image)), spec.short_side))


BUILT_IN = {"pillow": _read_pillow}


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    # Damaged EXIF data in a good image.
    except Exception:
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        # Heights, temperatures, counts: the file does not define white.
        raise Reject("not_decodable", f"Pillow: pixels of 32 bits a channel ({image.format})")
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit grey to its lowest 256 levels.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def canonical_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """(width, height) with the short side resized, the aspect ratio kept."""
    scale = short_side / min(size)
    return max(short_side, round(size[0] * scale)), max(short_side, round(size[1] * scale))


def resize_short_side(image: Image.Image, short_side: int) -> Image.Image:
    """Keeps the aspect ratio; an image that already fits is returned as it is."""
    if min(image.size) == short_side:
        return image
    return image.resize(canonical_size(image.size, short_side), Image.Resampling.BILINEAR, reducing_gap=2.0)
