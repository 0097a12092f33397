"""Sound files by soundfile, resampled by soxr."""

from __future__ import annotations

import io

import numpy as np

from pipeline.data.media.errors import Reject
from pipeline.data.media.storage import read_bytes
from pipeline.data.spec import AudioSpec


def clip_times(start_s: float, end_s: float | None) -> tuple[float, float | None]:
    """The clip's range in seconds. Raises Reject where a manifest holds something that is no time."""
    for value in (start_s, end_s):
        if value is not None and not (np.isfinite(value) and value >= 0):
            raise Reject("bad_times", f"start_s {start_s}, end_s {end_s}")
    return start_s, end_s


def decode_audio(
    path: str, spec: AudioSpec, *, start_s: float = 0.0, end_s: float | None = None, num_samples: int | None = None
) -> np.ndarray:
    """(samples,) float32 mono at ``spec.sample_rate_hz``, as ``to_mono`` cuts it."""
    import soundfile

    content = read_bytes(path)
    try:
        samples, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except Exception as e:
        raise Reject("not_decodable", f"soundfile: {e}") from e
    return to_mono(samples, rate=rate, spec=spec, start_s=start_s, end_s=end_s, num_samples=num_samples)


def to_mono(
    samples: np.ndarray,
    *,
    rate: float,
    spec: AudioSpec,
    start_s: float,
    end_s: float | None,
    num_samples: int | None = None,
) -> np.ndarray:
    """samples: (n, channels) float32 at ``rate`` Hz → mono at the spec's rate, from start_s.

    num_samples: at most so many; by default what one spectrogram needs.
    """
    import soxr

    start_s, end_s = clip_times(start_s, end_s)
    num_samples = num_samples or spec.num_samples
    stop_s = start_s + num_samples / spec.sample_rate_hz
    stop_s = stop_s if end_s is None else min(stop_s, end_s)
    mono = samples[int(start_s * rate) : int(np.ceil(stop_s * rate))].mean(axis=1, dtype=np.float32)
    if not mono.size:
        raise Reject("no_sound", f"{len(samples) / rate:.2f} s of sound, asked from {start_s:.2f} s")
    if not np.isfinite(mono).all():
        raise Reject("not_decodable", "the samples are not finite")
    if rate != spec.sample_rate_hz:
        mono = soxr.resample(mono, rate, spec.sample_rate_hz)
    return mono[:num_samples]
