"""Small pictures, film strips, spectrograms and sounds of items, as data that a page holds in itself."""

from __future__ import annotations

import base64
import dataclasses
import io

import numpy as np
import soundfile
from PIL import Image

from pipeline.data.media.errors import Reject
from pipeline.data.modalities import TEXT
from pipeline.data.spec import AudioSpec
from pipeline.data.tokens import log_mel
from pipeline.embed.search import Search
from pipeline.errors import DataError, RequestError
from pipeline.export.inputs import Input

# Maximum pixels of the longer side of a picture, and height of a frame of a film strip.
_PICTURE, _FRAME = 192, 72
# Maximum width of a film strip: of six frames at four to one.
_STRIP = 1728
# Frames of a film strip.
_FRAMES = 6
_QUALITY = 75
# Maximum seconds of a sound.
_SOUND_S = 10.0
# Height and maximum width of a spectrogram.
_SPECTROGRAM = (64, 256)
# A scale that rises in brightness, so that it is read in grey and by the colour-blind too (viridis).
_SCALE = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


@dataclasses.dataclass(frozen=True)
class Thumbnail:
    """picture, sound: data URIs. why_not: one line in their place if the item cannot be read."""

    picture: str | None = None
    width: int = 0
    height: int = 0
    sound: str | None = None
    why_not: str | None = None

    @property
    def num_bytes(self) -> int:
        return len(self.picture or "") + len(self.sound or "")


def thumbnail(
    search: Search, modality: str, source: str, data_set: str, times: tuple[float | None, float | None] = (None, None)
) -> Thumbnail:
    """The thumbnail of an item, decoded as its data set has it. A text has none."""
    if modality == TEXT:
        return Thumbnail()
    fitting = [i for i in search.encoder.config.inputs if i.modality == modality and i.settings is not None]
    one = next((i for i in fitting if i.data_set == data_set), fitting[0])
    try:
        clip = search.clip(source, one, times)
    except Reject as e:
        return Thumbnail(why_not=f"cannot be read now: {e.reason}")
    except (RequestError, DataError) as e:
        return Thumbnail(why_not=str(e)[:200])
    return _of_clip(clip, one)


def _of_clip(clip: np.ndarray, one: Input) -> Thumbnail:
    if one.modality == "audio":
        return _of_sound(clip, one.settings)
    if clip.ndim == 4 and clip.shape[-1] == 3 and clip.dtype == np.uint8:
        return _picture(film_strip(clip), width=_STRIP)
    if clip.ndim == 3 and clip.shape[-1] == 3 and clip.dtype == np.uint8:
        return _picture(clip)
    return Thumbnail(why_not="no picture of this modality")


def film_strip(frames: np.ndarray) -> np.ndarray:
    """(T, H, W, 3) → (72, width, 3) uint8: frames evenly spaced, side by side."""
    count, height, width, _ = frames.shape
    chosen = np.unique(np.linspace(0, count - 1, min(_FRAMES, count)).round().astype(int))
    size = (max(1, round(width * _FRAME / height)), _FRAME)
    small = [np.asarray(Image.fromarray(frames[i]).resize(size, Image.Resampling.LANCZOS)) for i in chosen]
    gap = np.full((_FRAME, 2, 3), 255, np.uint8)
    return np.concatenate([part for frame in small for part in (frame, gap)][:-1], axis=1)


def spectrogram(waveform: np.ndarray, spec: AudioSpec) -> np.ndarray:
    """(height, width, 3) uint8 of the log-mel spectrogram that the model sees, low notes below."""
    values = log_mel(waveform, spec).T[::-1]
    seen = max(1, min(values.shape[1], -(-len(waveform) // spec.hop_length)))
    values = values[:, :seen]
    low, high = np.percentile(values, 1), values.max()
    shares = np.clip((values - low) / max(high - low, 1e-6), 0, 1) * (len(_SCALE) - 1)
    scale = np.array(_SCALE, np.float32)
    colours = np.stack([np.interp(shares, np.arange(len(_SCALE)), scale[:, c]) for c in range(3)], axis=-1)
    height, width = _SPECTROGRAM
    size = (int(np.clip(3 * seen, 64, width)), height)
    return np.asarray(Image.fromarray(colours.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC))


def _of_sound(waveform: np.ndarray, spec: AudioSpec) -> Thumbnail:
    picture = _picture(spectrogram(waveform, spec), width=_SPECTROGRAM[1])
    return dataclasses.replace(picture, sound=_sound(waveform, spec.sample_rate_hz))


def _sound(waveform: np.ndarray, rate: int) -> str:
    """A compressed sound that every browser plays: MP3, or WAV where libsndfile is too old or the rate is no MP3's."""
    part, file = waveform[: int(_SOUND_S * rate)], io.BytesIO()
    try:
        soundfile.write(file, part, rate, format="MP3", subtype="MPEG_LAYER_III", compression_level=0.8)
        kind = "mpeg"
    except (soundfile.LibsndfileError, ValueError):
        file = io.BytesIO()
        soundfile.write(file, part, rate, format="WAV", subtype="PCM_16")
        kind = "wav"
    return f"data:audio/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _picture(pixels: np.ndarray, *, width: int = _PICTURE) -> Thumbnail:
    """The picture of (H, W, 3) uint8, made smaller where it does not fit into ``width`` and the height of pictures."""
    image, file = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((width, _PICTURE), Image.Resampling.LANCZOS)
    image.save(file, "WEBP", quality=_QUALITY, method=4)
    return Thumbnail(
        f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}", width=image.width, height=image.height
    )
