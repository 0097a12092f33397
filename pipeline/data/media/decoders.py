"""What a decoder is, and how a recipe names one.

Decoders run in a process of their own (``process.DecodeProcess``): one that crashes or hangs costs its sample, no more.
"""

from __future__ import annotations

import errno
import importlib
import io
from typing import Any, Protocol

import numpy as np

from pipeline.data.media.errors import Reject
from pipeline.errors import one_line


class Decoder(Protocol):
    """Reads the part of a file from start_s to end_s (None: to its end, or to what the spec asks for).

    source: a local path or the file's bytes. Returns, uint8 RGB of any size or float32 mono at the spec's rate:
    image (H, W, 3); video (T, H, W, 3), one frame for each 1 / fps s, at most ``max_frames``; audio (samples,).
    Whatever it raises makes the sample a reject. Times of images are always 0 and None.
    """

    def __call__(self, source: str | bytes, spec: Any, *, start_s: float, end_s: float | None) -> np.ndarray: ...


def find(name: str, *, built_in: dict[str, Decoder]) -> Decoder:
    """A decoder by its name, or one of the user's own as "package.module:function".

    Raises ValueError where there is none, with the names that exist.
    """
    if name in built_in:
        return built_in[name]
    module, colon, function = name.partition(":")
    wanted = f"expected one of {', '.join(built_in)} or package.module:function, found {name!r}"
    if not colon:
        raise ValueError(wanted)
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as e:
        raise ValueError(f"{wanted}: {e}") from e


def run(
    name: str, source: str | bytes, spec: Any, *, built_in: dict[str, Decoder], start_s: float, end_s: float | None
) -> np.ndarray:
    """What the named decoder makes of a file. Whatever it raises is a Reject, but for a lack of memory."""
    decode = find(name, built_in=built_in)
    try:
        return decode(source, spec, start_s=start_s, end_s=end_s)
    except (Reject, MemoryError):
        raise
    # Libraries raise many kinds (OSError, SyntaxError, ValueError, struct.error, ...) on damaged files.
    except Exception as e:
        if getattr(e, "errno", None) == errno.ENOMEM or "out of memory" in str(e).lower():
            raise MemoryError(str(e)) from e
        raise Reject("not_decodable", f"{name}: {type(e).__name__}: {one_line(e)}") from e


def as_file(source: str | bytes):
    """What libraries take: a path, or a file of the bytes."""
    return io.BytesIO(source) if isinstance(source, bytes) else source


def check_array(array: np.ndarray, *, dtype, ndim: int, what: str) -> np.ndarray:
    """Raises Reject where a decoder gave something else than it should."""
    array = np.asarray(array)
    if array.dtype != dtype or array.ndim != ndim or not array.size or (ndim > 1 and array.shape[-1] != 3):
        raise Reject(
            "not_decodable", f"the decoder gave {array.dtype} of shape {array.shape}, not {what}; is it broken?"
        )
    return array


def check_cap(found: float, most: float, *, reason: str, what: str) -> None:
    """Raises Reject where a file is beyond one of the recipe's caps."""
    if found > most:
        raise Reject(reason, f"{found:.10g} {what}, at most {most:.10g}")
