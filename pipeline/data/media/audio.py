"""Sound by soundfile; sound tracks and files that soundfile cannot read by PyAV. Resampled by soxr."""

from __future__ import annotations

import functools
import io

import numpy as np

from pipeline.data.media.container import check_duration, decodable, frames, open_container, seek, start_of
from pipeline.data.media.decoders import as_file, check_array, check_cap, run
from pipeline.data.media.errors import Reject
from pipeline.data.media.part import Part
from pipeline.data.spec import AudioSpec

_EMPTY = "the sound track is empty"
# Seconds decoded before the start: AAC needs one packet before it, MP3 and Opus up to a quarter of a second.
_PREROLL_S = 0.5
# Maximum absolute sample: far beyond integers that were stored as floats, far below where a spectrum overflows.
_MAX_SAMPLE = 1e12
# Marks of an MP3's header that has the number of its frames.
COUNTS = (b"Xing", b"Info", b"VBRI")
# Bytes in which the first frame ends.
FRAME_BYTES = 4096
# Seconds that two ways of counting an MP3's frames may differ by: two frames.
ROUNDING_S = 0.1


def clip_times(start_s: float, end_s: float | None) -> tuple[float, float | None]:
    """The clip's range in seconds. Raises Reject for values that are not times."""
    for value in (start_s, end_s):
        if value is not None and not (np.isfinite(value) and value >= 0):
            raise Reject("bad_times", f"start_s {start_s}, end_s {end_s}")
    return start_s, end_s


def decode(source: str | bytes, spec: AudioSpec, part: Part) -> np.ndarray:
    """``decode_audio`` of a canonical waveform, as ``modalities`` calls it."""
    # Only PyAV reads the sound track of a video; a user's own decoder may do so too.
    from_video = part.column == "video"
    return decode_audio(
        source,
        spec,
        start_s=part.start_s,
        end_s=part.end_s,
        num_samples=num_samples(spec, clip_s=part.clip_s),
        decoder="pyav" if from_video and ":" not in spec.decoder else None,
    )


def num_samples(spec: AudioSpec, *, clip_s: float) -> int:
    """Samples of a canonical waveform: a spectrogram may start at any frame of the clip beside it."""
    return spec.num_samples + round(clip_s * spec.sample_rate_hz)


def decode_audio(
    source: str | bytes,
    spec: AudioSpec,
    *,
    start_s: float = 0.0,
    end_s: float | None = None,
    num_samples: int | None = None,
    decoder: str | None = None,
) -> np.ndarray:
    """(samples,) float32 mono at ``spec.sample_rate_hz`` from start_s on, at most ``num_samples``.

    num_samples: one spectrogram's by default. decoder: the spec's by default.
    """
    start_s, end_s = clip_times(start_s, end_s)
    num_samples = num_samples or spec.num_samples
    stop_s = start_s + num_samples / spec.sample_rate_hz
    stop_s = stop_s if end_s is None else min(stop_s, end_s)
    if stop_s <= start_s:
        raise Reject("no_sound", f"asked from {start_s:.2f} s to {stop_s:.2f} s")
    samples = run(decoder or spec.decoder, source, spec, built_in=BUILT_IN, start_s=start_s, end_s=stop_s)
    samples = check_array(samples, dtype=np.float32, ndim=1, what="float32 (samples,)")
    if not np.isfinite(samples).all():
        raise Reject("not_decodable", "the samples are not finite")
    if max(samples.max(), -samples.min()) > _MAX_SAMPLE:
        raise Reject("not_decodable", f"samples beyond {_MAX_SAMPLE:.0e}, where full scale is 1: not sound")
    return samples[:num_samples]


def _read_soundfile(source: str | bytes, spec: AudioSpec, *, start_s: float, end_s: float) -> np.ndarray:
    import soundfile

    try:
        file = soundfile.SoundFile(as_file(source))
    except soundfile.LibsndfileError as e:
        try:
            return _read_pyav(source, spec, start_s=start_s, end_s=end_s)
        # libsndfile's message for an unknown format is misleading ("does not exist").
        except Reject as other:
            if other.detail == _EMPTY:  # not a sound file in spite of its name
                raise Reject("not_decodable", "neither soundfile nor PyAV finds sound in it") from e
            raise Reject(other.reason, f"soundfile cannot read it; {other.detail}") from e
    with file:
        rate, length_s = file.samplerate, file.frames / file.samplerate
        check_cap(length_s, spec.max_duration_s, reason="too_long", what="s")
        start, stop = int(start_s * rate), min(file.frames, int(np.ceil(end_s * rate)))
        if stop == file.frames and file.format == "MP3" and _goes_on(source, length_s, spec):
            return _read_pyav(source, spec, start_s=start_s, end_s=end_s)
        if start >= stop:
            raise Reject("no_sound", f"{length_s:.2f} s of sound, asked from {start_s:.2f} s")
        file.seek(start)
        samples = file.read(stop - start, dtype="float32", always_2d=True)
    return to_mono(samples, rate=rate, spec=spec)


def _goes_on(source: str | bytes, length_s: float, spec: AudioSpec) -> bool:
    """Whether an MP3 is longer than libsndfile says.

    Without a count of its frames (a Xing or VBRI header) libsndfile takes the first frame's bit rate for that of all:
    of a file with a variable one it would read a part.
    """
    if any(mark in _first_frame(source) for mark in COUNTS):
        return False
    after_s = length_s + ROUNDING_S
    try:
        _read_pyav(source, spec, start_s=after_s, end_s=after_s + ROUNDING_S)
    except Reject:
        return False
    return True


def _first_frame(source: str | bytes) -> bytes:
    """The bytes after an MP3's tag (ID3), with its first frame: the header that counts the frames is there."""
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        start = file.read(10)
        # The size of the tag, in bytes of seven bits.
        size = sum(byte << 7 * place for place, byte in enumerate(reversed(start[6:]))) + len(start)
        file.seek(size if start.startswith(b"ID3") else 0)
        return file.read(FRAME_BYTES)


def _read_pyav(source: str | bytes, spec: AudioSpec, *, start_s: float, end_s: float) -> np.ndarray:
    """The first sound track, on the clock of the video if there is one."""
    with open_container(source) as container:
        if not container.streams.audio:
            raise Reject("no_sound", "there is no sound track")
        stream = decodable(container.streams.audio[0])
        check_duration(container, stream, max_duration_s=spec.max_duration_s)
        starts = [start_of(s) for s in (*container.streams.video[:1], stream)]
        zero_s = next((s for s in starts if s is not None), 0.0)
        if start_s > _PREROLL_S:
            seek(container, stream, zero_s + start_s - _PREROLL_S)
        samples, first_s, rate = _collect(container, stream, start_s=zero_s + start_s, stop_s=zero_s + end_s)
    start = round((zero_s + start_s - first_s) * rate)
    # A track that begins after the video is silent until then.
    samples = np.pad(samples, ((max(0, -start), 0), (0, 0)))[max(0, start) :]
    samples = samples[: int(np.ceil((end_s - start_s) * rate))]
    if not len(samples) or first_s >= zero_s + end_s:
        raise Reject("no_sound", f"no sound from {start_s:.2f} s to {end_s:.2f} s")
    return to_mono(samples, rate=rate, spec=spec)


def _collect(container, stream, *, start_s: float, stop_s: float) -> tuple[np.ndarray, float, int]:
    """((n, channels) float32, time of the first in seconds, rate in Hz) from start_s or earlier to stop_s or later.

    Times are on the container's clock. Samples before them, read if the container cannot seek, are dropped.
    """
    import av

    parts = []
    first_s = rate = resampler = None
    for frame in frames(container, stream):
        if resampler is None:
            rate, time_s = frame.sample_rate, frame.time or 0.0
            resampler = av.AudioResampler(format="fltp", layout=frame.layout, rate=rate)
        # Frames without timestamps follow each other.
        time_s = time_s if frame.time is None else frame.time
        samples = [f.to_ndarray() for f in resampler.resample(frame)]
        if time_s + frame.samples / rate > start_s:
            first_s = time_s if first_s is None else first_s
            parts += samples
        time_s += frame.samples / rate
        if time_s >= stop_s:
            break
    if not parts:
        raise Reject("no_sound", _EMPTY)
    return np.concatenate(parts, axis=1).T, first_s, rate


def to_mono(samples: np.ndarray, *, rate: float, spec: AudioSpec) -> np.ndarray:
    """(n, channels) float32 at ``rate`` Hz → (m,) at the spec's rate. Raises Reject if there are no samples."""
    if not samples.size:
        raise Reject("no_sound", "no samples in the asked range")
    # numpy's mean over such a short axis takes longer than decoding.
    mono = functools.reduce(np.add, samples.T) / np.float32(samples.shape[1])
    if rate != spec.sample_rate_hz:
        import soxr

        mono = soxr.resample(mono, rate, spec.sample_rate_hz)
    return mono.astype(np.float32, copy=False)


BUILT_IN = {"soundfile": _read_soundfile, "pyav": _read_pyav}
