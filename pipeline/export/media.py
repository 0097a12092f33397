"""A picture, clip, sound or text as a user gives it → what evaluation decodes from a file of it, in this process.

* images: a path, a PIL image, or (height, width, 3) uint8 RGB.
* videos: a path, or (frames, height, width, 3) uint8 RGB with their ``fps``.
* audio: a path (of a video too), or (samples,) or (samples, channels) with their ``sample_rate``: floats from -1 to 1,
  or int16.
* texts: str. Others, which a recipe added: a path, or the array that their decoder returns.

Files are decoded as evaluation decodes them, to the bit. Arrays and PIL images are resized and resampled as frames and
samples of a file are; a large JPEG is decoded at a part of its size and a video's frames are resized by its decoder, so
that their pixels may differ in the last bits from those of an array of all pixels.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from typing import Any

import numpy as np

from pipeline.data.media.decoders import check_array, decode_file
from pipeline.data.media.errors import Reject
from pipeline.data.media.part import Part
from pipeline.data.modalities import Modality
from pipeline.data.spec import AudioSpec, ImageSpec, VideoSpec
from pipeline.errors import RequestError

# Package that has a module, where the names differ.
_PACKAGES = {"PIL": "pillow"}
# Modules that files of a modality are decoded with, and those of a decoder.
_MODULES = {"image": ("PIL",), "video": ("PIL",), "audio": ()}
_DECODERS = {"pillow": ("PIL",), "pyav": ("av",), "decord": ("decord", "av"), "soundfile": ("soundfile",)}


@dataclasses.dataclass(frozen=True)
class Rates:
    """What arrays do not say of themselves. fps: frames per second. sample_rate: samples per second."""

    fps: float | None = None
    sample_rate: float | None = None


def canonical(item: Any, name: str, modality: Modality, settings: Any, *, clip_s: float, rates: Rates) -> np.ndarray:
    """The canonical clip of an item, as ``media.clip.Clip`` has it. Raises Reject for bad media, RequestError."""
    if isinstance(item, str | os.PathLike):
        return _file(os.fspath(item), name, modality, settings, clip_s)
    if name == "image":
        return _image(item, settings)
    if not isinstance(item, np.ndarray):
        raise RequestError(f"expected a path or a numpy array, found {type(item).__name__}")
    if name == "video":
        return _video(item, settings, rates.fps)
    if name == "audio":
        return _audio(item, settings, clip_s, rates.sample_rate)
    return item


def _file(path: str, name: str, modality: Modality, settings: Any, clip_s: float) -> np.ndarray:
    if "://" in path:
        raise RequestError(f"expected a path of this machine, found {path}; download it first")
    if not os.path.isfile(path):
        raise Reject("missing_file", path)
    size = os.path.getsize(path)
    if not size:
        raise Reject("empty_file", path)
    if size > settings.max_bytes:
        raise Reject("too_large", f"{size} bytes, at most {settings.max_bytes}")
    check_decoder(name, getattr(settings, "decoder", ""))
    try:
        return decode_file(path, settings, Part(name, clip_s=clip_s), name=modality.decode)
    except Reject as e:
        if isinstance(e.__cause__, ModuleNotFoundError):
            raise _needed(str(e.__cause__.name), name) from e
        raise


def check_decoder(name: str, decoder: str) -> None:
    """Raises RequestError for a decoder that is code of the run's own, or whose packages are missing."""
    if ":" in decoder:
        raise RequestError(f"{name} files were decoded by {decoder}, and an export runs no such code: give arrays")
    for module in (*_MODULES.get(name, ()), *_DECODERS.get(decoder, ())):
        if importlib.util.find_spec(module) is None:
            raise _needed(module, name)


def _needed(module: str, name: str) -> RequestError:
    package = _PACKAGES.get(module, module)
    return RequestError(f"{name} files need the package {package}, which is not installed: pip install {package}")


def _image(item: Any, settings: ImageSpec) -> np.ndarray:
    if importlib.util.find_spec("PIL") is None:
        raise _needed("PIL", "image")
    from PIL import Image

    from pipeline.data.media.image import canonical_pixels

    if isinstance(item, np.ndarray):
        _check_pixels(item, ndim=3, expected="(height, width, 3) uint8")
        item = Image.fromarray(np.ascontiguousarray(item))
    if not isinstance(item, Image.Image):
        raise RequestError(f"expected a path, a PIL image or a numpy array, found {type(item).__name__}")
    return canonical_pixels(item, settings)


def _video(item: np.ndarray, settings: VideoSpec, fps: float | None) -> np.ndarray:
    if importlib.util.find_spec("PIL") is None:
        raise _needed("PIL", "video")
    from pipeline.data.media.video import canonical_frames, frame_indices

    _check_pixels(item, ndim=4, expected="(frames, height, width, 3) uint8")
    if fps is None or not 0 < fps < math.inf:
        raise RequestError(f"expected fps=, the frames per second of an array of frames, found {fps}")
    return canonical_frames(item[frame_indices(np.arange(len(item)) / fps, settings, 0.0, None)], settings)


def _check_pixels(item: np.ndarray, *, ndim: int, expected: str) -> None:
    if item.dtype != np.uint8 or item.ndim != ndim or item.shape[-1] != 3 or not item.size:
        raise RequestError(f"expected {expected} RGB, found {item.shape} {item.dtype}")


def _audio(item: np.ndarray, settings: AudioSpec, clip_s: float, rate: float | None) -> np.ndarray:
    from pipeline.data.media.audio import num_samples, to_mono

    floats = np.issubdtype(item.dtype, np.floating)
    if item.ndim not in (1, 2) or not item.size or not (floats or item.dtype == np.int16):
        found = f"{item.shape} {item.dtype}"
        raise RequestError(f"expected (samples,) or (samples, channels) float or int16, found {found}")
    if rate is None or not 0 < rate < math.inf:
        raise RequestError(f"expected sample_rate=, the samples per second of an array of sound, found {rate}")
    if rate != settings.sample_rate_hz and importlib.util.find_spec("soxr") is None:
        raise RequestError(f"sound at {rate:g} Hz needs the package soxr to become {settings.sample_rate_hz} Hz")
    count = num_samples(settings, clip_s=clip_s)
    # No more than a decoder reads of a file.
    part = item[: math.ceil(count / settings.sample_rate_hz * rate)].reshape(-1, *item.shape[1:])
    part = part.astype(np.float32) / np.float32(1 if floats else 1 << 15)
    samples = to_mono(part[:, None] if part.ndim == 1 else part, rate=rate, spec=settings)[:count]
    if not np.isfinite(samples).all() or (floats and np.abs(part).max() > 64):
        raise RequestError("expected finite samples from -1 to 1, found others")
    return check_array(samples, dtype=np.float32, ndim=1, what="float32 (samples,)")
