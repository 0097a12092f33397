"""Still images by Pillow."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipeline.data.media.errors import Reject
from pipeline.data.media.storage import read_bytes
from pipeline.data.spec import ImageSpec

_FORMATS = ["JPEG", "PNG", "WEBP", "GIF"]
# The recipe's cap on pixels is checked before anything is decoded, so Pillow's own is not needed.
Image.MAX_IMAGE_PIXELS = None


def decode_image(path: str, spec: ImageSpec) -> np.ndarray:
    """(H, W, 3) uint8, the short side ``spec.short_side`` pixels. Transparency is laid over white."""
    content = read_bytes(path)
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
        for width, height in (image.size, _canonical_size(image.size, spec.short_side)):
            if width * height > spec.max_pixels:
                raise Reject("too_large", f"{width}x{height} pixels, at most {spec.max_pixels}")
        image = _to_rgb(image)
    except Reject:
        raise
    # Pillow raises many kinds (OSError, SyntaxError, ValueError, struct.error, ...) on damaged files.
    except Exception as e:
        raise Reject("not_decodable", f"Pillow: {e!r}") from e
    return np.asarray(resize_short_side(image, spec.short_side))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips 16-bit grey to its lowest 256 levels.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _canonical_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    scale = short_side / min(size)
    return max(short_side, round(size[0] * scale)), max(short_side, round(size[1] * scale))


def resize_short_side(image: Image.Image, short_side: int) -> Image.Image:
    """Keeps the aspect ratio; an image that already fits is returned as it is."""
    if min(image.size) == short_side:
        return image
    return image.resize(_canonical_size(image.size, short_side), Image.Resampling.BILINEAR, reducing_gap=2.0)
