"""Sound files by soundfile, resampled by soxr."""

from __future__ import annotations

import io

import numpy as np

from pipeline.data.media.errors import Reject
from pipeline.data.media.storage import read_bytes
from pipeline.data.spec import AudioSpec


def decode_audio(path: str, spec: AudioSpec, *, start_s: float = 0.0, end_s: float | None = None) -> np.ndarray:
    """(samples,) float32 mono at ``spec.sample_rate_hz``, from start_s, at most what one spectrogram needs."""
    import soundfile

    content = read_bytes(path)
    try:
        samples, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except Exception as e:
        raise Reject("not_decodable", f"soundfile: {e}") from e
    return to_mono(samples, rate=rate, spec=spec, start_s=start_s, end_s=end_s)


def to_mono(samples: np.ndarray, *, rate: float, spec: AudioSpec, start_s: float, end_s: float | None) -> np.ndarray:
    """samples: (n, channels) float32 at ``rate`` Hz → mono at the spec's rate, cut to the clip."""
    import soxr

    stop_s = start_s + spec.num_samples / spec.sample_rate_hz
    stop_s = stop_s if end_s is None else min(stop_s, end_s)
    mono = samples[int(start_s * rate) : int(np.ceil(stop_s * rate))].mean(axis=1, dtype=np.float32)
    if not mono.size:
        raise Reject("no_sound", f"{len(samples) / rate:.2f} s of sound, asked from {start_s:.2f} s")
    if not np.isfinite(mono).all():
        raise Reject("not_decodable", "the samples are not finite")
    if rate != spec.sample_rate_hz:
        mono = soxr.resample(mono, rate, spec.sample_rate_hz)
    return mono[: spec.num_samples]
