"""The canonical clip of one row, or the reason why there is none."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from pipeline.data.media import audio, image, video
from pipeline.data.media.errors import Reject
from pipeline.data.media.storage import check_uri, local_path_or_bytes
from pipeline.data.spec import DataSetSpec

# The decoders that a recipe can name, by modality.
BUILT_IN = {"image": image.BUILT_IN, "video": video.BUILT_IN, "audio": audio.BUILT_IN}


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


def open_media(row: dict, data_set: DataSetSpec, modality: str) -> Callable[[], np.ndarray]:
    """Reaches the storage of one modality of a manifest row; the function it returns decodes.

    Raises Reject for media that are not there, too large or of a scheme that is not allowed, RequestError where the
    package for a scheme is missing, DataError for storage out of reach. The function raises
    only Reject.
    """
    start_s, end_s = row.get("start_s") or 0.0, row.get("end_s")
    spec = getattr(data_set, modality)
    path, from_video = source_path(row, modality)
    check_uri(path, data_set.allowed_schemes)
    source = local_path_or_bytes(path, max_bytes=spec.max_bytes)
    if modality == "image":
        return functools.partial(image.decode_image, source, spec)
    if modality == "video":
        return functools.partial(video.decode_video, source, spec, start_s=start_s, end_s=end_s)
    # Only PyAV reads the sound track of a video; a decoder of the user's own gets the choice.
    decoder = "pyav" if from_video and ":" not in spec.decoder else None
    return functools.partial(
        audio.decode_audio,
        source,
        spec,
        start_s=start_s,
        end_s=end_s,
        num_samples=num_samples(data_set),
        decoder=decoder,
    )


def decode_media(row: dict, data_set: DataSetSpec, modality: str) -> np.ndarray:
    """Decodes one modality of a manifest row in this process. Raises as ``open_media`` does."""
    return open_media(row, data_set, modality)()


def num_samples(data_set: DataSetSpec) -> int:
    """Samples of a canonical waveform: a spectrogram may start with any frame of the clip beside it."""
    clip_s = data_set.video.max_frames / data_set.video.fps
    return data_set.audio.num_samples + round(clip_s * data_set.audio.sample_rate_hz)


def source_path(row: dict, modality: str) -> tuple[str, bool]:
    """(where the modality comes from, whether it is the sound track of a video). Raises Reject where nowhere."""
    from_video = modality == "audio" and not row.get("audio")
    column = "video" if from_video else modality
    if not row.get(column):
        raise Reject("no_media", f"column {column!r} is empty")
    return row[column], from_video
