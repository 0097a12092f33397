"""Depth maps as a recipe adds them, from 16-bit PNG files: shared with vision, and with layers of their own."""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

from pipeline.data.media.decoders import as_file
from pipeline.data.media.errors import Reject
from pipeline.data.modalities import Embedder, Modality
from pipeline.data.sample_tokens import TokenContext, Tokens
from pipeline.data.tokens import grid_positions

PATCH = 8


@dataclasses.dataclass(frozen=True)
class DepthSpec:
    """max_mm: depth shown as white. size: of a map in pixels, cut to whole patches."""

    max_mm: int = 1000
    size: tuple[int, int] = (32, 32)
    max_bytes: int = 1 << 20


def decode(source, spec, part):
    """(H, W) float32 from 0 to 1."""
    with Image.open(as_file(source), formats=("PNG",)) as image:
        if not image.mode.startswith("I"):
            raise Reject("not_decodable", f"expected a 16-bit PNG, found mode {image.mode}")
        depth = np.asarray(image, np.float32)[: spec.size[0], : spec.size[1]]
    return np.minimum(depth / spec.max_mm, 1)


def decode_as_picture(source, spec, part):
    """(H, W, 3) uint8."""
    grey = np.rint(255 * decode(source, spec, part)).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def num_tokens(spec):
    return spec.size[0] // PATCH * (spec.size[1] // PATCH)


def tokens(depth: np.ndarray, spec: DepthSpec, context: TokenContext) -> Tokens:
    rows, columns = spec.size[0] // PATCH, spec.size[1] // PATCH
    cut = depth.reshape(rows, PATCH, columns, PATCH).transpose(0, 2, 1, 3).reshape(rows * columns, PATCH * PATCH)
    return Tokens(cut, grid_positions((rows, columns), DEPTH.embedder.positions))


DEPTH = Modality(
    decode="tests.depth:decode",
    settings="tests.depth:DepthSpec",
    tokens="tests.depth:tokens",
    embedder=Embedder(num_values=PATCH * PATCH, positions=(8, 8), num_tokens="tests.depth:num_tokens"),
)
DEPTH_AS_VISION = Modality(
    decode="tests.depth:decode_as_picture",
    settings="tests.depth:DepthSpec",
    tokens="pipeline.data.sample_tokens:image_tokens",
    embedder="vision",
)
