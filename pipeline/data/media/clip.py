"""The canonical clip of one row, or the reason why it has none."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.data.media import audio, image, video
from pipeline.data.media.decoders import decode_file
from pipeline.data.media.errors import Reject
from pipeline.data.media.part import Part
from pipeline.data.media.storage import check_uri, local_path_or_bytes
from pipeline.data.spec import DataSetSpec

# The decoders that a recipe can name, by modality.
BUILT_IN = {"image": image.BUILT_IN, "video": video.BUILT_IN, "audio": audio.BUILT_IN}


@dataclasses.dataclass(frozen=True)
class Clip:
    """A decoded row.

    media: modality → array. image: (H, W, 3) uint8. video: (T, H, W, 3) uint8 at the spec's frame rate. audio:
    (samples,) float32 mono at the spec's sample rate, from the same start as the video.
    """

    id: str
    media: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    text: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class MediaFile:
    """One modality of a row, and how to decode it. decode: "package.module:function" of ``modalities.Modality``."""

    path: str
    part: Part
    decode: str
    settings: Any
    schemes: tuple[str, ...]


def media_file(row: dict, data_set: DataSetSpec, name: str) -> MediaFile:
    """The file of a row's modality. Raises Reject if the row names none."""
    modality = data_set.modality(name)
    path, column = source_path(row, modality.columns_of(name))
    part = Part(column, row.get("start_s") or 0.0, row.get("end_s"), data_set.clip_s)
    return MediaFile(path, part, modality.decode, data_set.settings(name), data_set.allowed_schemes)


def source_path(row: dict, columns: tuple[str, ...]) -> tuple[str, str]:
    """(path, its column) from the first column that is not empty. Raises Reject if all are."""
    column = next((c for c in columns if row.get(c)), None)
    if column is None:
        raise Reject("no_media", f"column {columns[-1]!r} is empty")
    return row[column], column


def open_media(file: MediaFile) -> Callable[[], np.ndarray]:
    """Opens the storage of a file and returns a function that decodes it; its first argument is the source.

    Raises Reject for a file that is missing, too large or of a forbidden scheme, RequestError if the package for a
    scheme is missing, DataError if storage is unreachable. The function itself raises only Reject and MemoryError.
    """
    check_uri(file.path, file.schemes)
    source = local_path_or_bytes(file.path, max_bytes=file.settings.max_bytes)
    return functools.partial(decode_file, source, file.settings, file.part, name=file.decode)


def decode_media(row: dict, data_set: DataSetSpec, modality: str) -> np.ndarray:
    """Decodes one modality of a manifest row in this process. Raises as ``open_media`` does."""
    return open_media(media_file(row, data_set, modality))()
