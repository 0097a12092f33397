"""The canonical clip of one row, or the reason why there is none."""

from __future__ import annotations

import dataclasses

import numpy as np

from pipeline.data.media.audio import decode_audio
from pipeline.data.media.errors import Reject
from pipeline.data.media.image import decode_image
from pipeline.data.media.video import decode_sound_track, decode_video
from pipeline.data.spec import DataSetSpec


@dataclasses.dataclass(frozen=True)
class Clip:
    """What is decoded of one row.

    image: (H, W, 3) uint8. video: (T, H, W, 3) uint8 at the spec's frame rate. audio: (samples,) float32 mono at the
    spec's sample rate, from the same start as the video. Each None where it was not asked for.
    """

    id: str
    image: np.ndarray | None = None
    video: np.ndarray | None = None
    audio: np.ndarray | None = None
    text: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


def decode_media(row: dict, data_set: DataSetSpec, modality: str) -> np.ndarray:
    """Decodes one modality of a manifest row. Raises Reject for bad media, DataError for storage out of reach."""
    start_s, end_s = row.get("start_s") or 0.0, row.get("end_s")
    if modality == "image":
        return decode_image(_path(row, "image"), data_set.image)
    if modality == "video":
        return decode_video(_path(row, "video"), data_set.video, start_s=start_s, end_s=end_s)
    decode = decode_audio if row.get("audio") else decode_sound_track
    path = row.get("audio") or _path(row, "video")
    return decode(path, data_set.audio, start_s=start_s, end_s=end_s, num_samples=num_samples(data_set))


def num_samples(data_set: DataSetSpec) -> int:
    """Samples of a canonical waveform: a spectrogram may start with any frame of the clip beside it."""
    clip_s = data_set.video.max_frames / data_set.video.fps
    return data_set.audio.num_samples + round(clip_s * data_set.audio.sample_rate_hz)


def _path(row: dict, column: str) -> str:
    if not row.get(column):
        raise Reject("no_media", f"column {column!r} is empty")
    return row[column]
