"""Small pictures for pages, as data URIs: of images, films, sounds, and of the tokens that a model sees."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from pipeline.data.spec import AudioSpec
from pipeline.data.tokens import log_mel

# Longer side of a thumbnail in pixels, and the height of a strip or a spectrogram.
_SIDE, _STRIP = 112, 72
# Frames of a strip.
_FRAMES = 8
# Maximum pixels of a side in the format of thumbnails, WebP.
_MAX_SIDE = 16_383
# Colours of a spectrogram from its quietest to its loudest point: viridis, readable for the colour-blind.
_COLORS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], np.float32)
_QUALITY = 72
# Grey of a token that was dropped.
_DROPPED = 128


def image_uri(pixels: np.ndarray, *, side: int = _SIDE) -> str:
    """A (H, W, 3) uint8 image, its longer side at most ``side`` pixels."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    scale = min(side, _MAX_SIDE) / max(image.size)
    if scale < 1:
        image = image.resize([max(1, round(scale * n)) for n in image.size], Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "WEBP", quality=_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()


def strip_uri(frames: np.ndarray, *, count: int = _FRAMES, height: int = _STRIP) -> str:
    """At most ``count`` frames of (T, H, W, 3) uint8 beside each other, evenly spread over the film."""
    chosen = frames[np.linspace(0, len(frames) - 1, min(count, len(frames))).astype(int)]
    # A light line between two frames.
    gap = np.full((chosen.shape[1], max(1, chosen.shape[2] // 32), 3), 255, np.uint8)
    parts = [part for frame in chosen for part in (frame, gap)][:-1]
    strip = np.concatenate(parts, axis=1)
    return image_uri(strip, side=max(height, round(height * strip.shape[1] / strip.shape[0])))


def spectrogram_uri(waveform: np.ndarray, spec: AudioSpec, *, height: int = 2 * _STRIP) -> str:
    """The log-mel spectrogram of (samples,) float32, time to the right and low tones at the bottom."""
    return spectrum_uri(log_mel(waveform, spec), height=height)


def spectrum_uri(values: np.ndarray, *, height: int = 2 * _STRIP) -> str:
    """A spectrogram (time, frequencies) in colours from its lowest to its highest value."""
    low, high = float(values.min()), float(values.max())
    level = (values.T[::-1] - low) / (high - low or 1.0) * (len(_COLORS) - 1)
    below = np.clip(level.astype(int), 0, len(_COLORS) - 2)
    share = (level - below)[..., None]
    pixels = (_COLORS[below] * (1 - share) + _COLORS[below + 1] * share).astype(np.uint8)
    # Points are enlarged whole: a spectrogram is no photograph.
    times = max(1, height // pixels.shape[0])
    return image_uri(pixels.repeat(times, 0).repeat(times, 1), side=_MAX_SIDE)


def unpatched(
    tokens: np.ndarray, grid: tuple[int, int, int], patch: tuple[int, int, int], places: np.ndarray
) -> np.ndarray:
    """(T, H, W, 3) uint8 of vision tokens (N, P), as ``tokens.patchify`` cut them; grey where a token was dropped.

    places: (N,) the number of each token in the grid.
    """
    t, h, w = patch
    whole = np.full((int(np.prod(grid)), tokens.shape[1]), _DROPPED, np.uint8)
    whole[places] = tokens
    frames = whole.reshape(*grid, t, h, w, 3).transpose(0, 3, 1, 4, 2, 5, 6)
    return frames.reshape(grid[0] * t, grid[1] * h, grid[2] * w, 3)


def unpatched_spectrum(tokens: np.ndarray, spec: AudioSpec) -> np.ndarray:
    """(time, frequencies) of the tokens of a spectrogram."""
    (rows, columns), (time, frequency) = spec.grid, spec.patch
    return tokens.reshape(rows, columns, time, frequency).transpose(0, 2, 1, 3).reshape(rows * time, -1)
