"""Still images by Pillow."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipeline.data.media.errors import Reject
from pipeline.data.media.storage import read_bytes
from pipeline.data.spec import ImageSpec

_FORMATS = ["JPEG", "PNG", "WEBP", "GIF"]


def decode_image(path: str, spec: ImageSpec) -> np.ndarray:
    """(H, W, 3) uint8, the short side ``spec.short_side`` pixels. Transparency is laid over white."""
    content = read_bytes(path)
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
        if image.width * image.height > spec.max_pixels:
            raise Reject("too_large", f"{image.width}x{image.height} pixels, at most {spec.max_pixels}")
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
    return image.convert("RGB")


def resize_short_side(image: Image.Image, short_side: int) -> Image.Image:
    """Keeps the aspect ratio; an image that already fits is returned as it is."""
    width, height = image.size
    if min(width, height) == short_side:
        return image
    scale = short_side / min(width, height)
    size = (max(short_side, round(width * scale)), max(short_side, round(height * scale)))
    return image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
