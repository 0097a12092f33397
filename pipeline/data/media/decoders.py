"""The interface of decoders, and how a recipe names one.

Decoders run in a separate process (``process.DecodeProcess``): one that crashes or hangs costs only its sample.
"""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from pipeline.data.media.errors import Reject
from pipeline.data.media.part import Part
from pipeline.data.modalities import load
from pipeline.errors import one_line


class Decoder(Protocol):
    """Reads the part of a file from start_s to end_s (None: to the end of the file or of the canonical clip).

    source: a local path or the file's bytes. Returns uint8 RGB of any size or float32 mono at the spec's rate:
    image (H, W, 3); video (T, H, W, 3), one frame every 1 / fps s, at most ``max_frames``; audio (samples,).
    Any exception rejects the sample. For images start_s is 0 and end_s None.
    """

    def __call__(self, source: str | bytes, spec: Any, *, start_s: float, end_s: float | None) -> np.ndarray: ...


def find(name: str, *, built_in: dict[str, Decoder]) -> Decoder:
    """A built-in decoder, or the user's own as "package.module:function".

    Raises ValueError for an unknown name, listing the known ones.
    """
    if name in built_in:
        return built_in[name]
    wanted = f"expected one of {', '.join(built_in)} or package.module:function, found {name!r}"
    if ":" not in name:
        raise ValueError(wanted)
    try:
        return load(name)
    except ValueError as e:
        raise ValueError(f"{wanted}: {e.__cause__}") from e


def run(
    name: str, source: str | bytes, spec: Any, *, built_in: dict[str, Decoder], start_s: float, end_s: float | None
) -> np.ndarray:
    """A file decoded by the named decoder. Every exception becomes a Reject, except a lack of memory."""
    decode = find(name, built_in=built_in)
    return _or_reject(name, lambda: decode(source, spec, start_s=start_s, end_s=end_s))


def decode_file(source: str | bytes, settings: Any, part: Part, *, name: str) -> np.ndarray:
    """A file decoded by a modality's ``decode`` function. Every exception becomes a Reject, except a lack of memory."""
    decode = load(name)
    return _or_reject(name, lambda: decode(source, settings, part))


def _or_reject(name: str, decode: Callable[[], np.ndarray]) -> np.ndarray:
    try:
        return decode()
    except (Reject, MemoryError):
        raise
    # Libraries raise many kinds (OSError, SyntaxError, ValueError, struct.error, ...) on damaged files.
    except Exception as e:
        if getattr(e, "errno", None) == errno.ENOMEM or "out of memory" in str(e).lower():
            raise MemoryError(str(e)) from e
        raise Reject("not_decodable", f"{name}: {type(e).__name__}: {one_line(e)}") from e


def as_file(source: str | bytes) -> str | io.BytesIO:
    """A path, or an open file of the bytes: either is accepted by libraries."""
    return io.BytesIO(source) if isinstance(source, bytes) else source


def check_array(array: np.ndarray, *, dtype: type, ndim: int, what: str) -> np.ndarray:
    """The array itself. Raises Reject if a decoder returned anything else than expected."""
    array = np.asarray(array)
    if array.dtype != dtype or array.ndim != ndim or not array.size or (ndim > 1 and array.shape[-1] != 3):
        raise Reject(
            "not_decodable", f"the decoder returned {array.dtype} of shape {array.shape}, not {what}; is it broken?"
        )
    return array


def check_cap(found: float, limit: float, *, reason: str, what: str) -> None:
    """Raises Reject if a file exceeds one of the recipe's caps."""
    if found > limit:
        raise Reject(reason, f"{found:.10g} {what}, at most {limit:.10g}")
