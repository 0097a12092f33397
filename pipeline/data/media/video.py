"""Video frames and sound tracks: decord first, PyAV where decord cannot."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipeline.data.media.audio import to_mono
from pipeline.data.media.errors import Reject
from pipeline.data.media.image import resize_short_side
from pipeline.data.media.storage import local_path_or_bytes
from pipeline.data.spec import AudioSpec, VideoSpec


def decode_video(path: str, spec: VideoSpec, *, start_s: float = 0.0, end_s: float | None = None) -> np.ndarray:
    """(T, H, W, 3) uint8: at each time start_s + i / fps the last frame shown by then, at most ``max_frames``."""
    source = local_path_or_bytes(path)
    errors = []
    # decord fails on good files at some widths (its own output buffers), so PyAV has a say before a file is called bad.
    for read in (_read_decord, _read_pyav):
        try:
            frames = read(source, spec, start_s, end_s)
        except Reject:
            raise
        except Exception as e:
            errors.append(f"{read.__name__.removeprefix('_read_')}: {' '.join(str(e).split())[:120]}")
            continue
        return _resize(frames, spec.short_side)
    raise Reject("not_decodable", "; ".join(errors))


def _times_to_indices(shown_s: np.ndarray, spec: VideoSpec, start_s: float, end_s: float | None) -> np.ndarray:
    """Frame numbers for the clip's times. shown_s: when each frame is first shown, ascending."""
    if not len(shown_s):
        raise Reject("no_frames", "the video has no frames")
    frame_s = np.median(np.diff(shown_s)) if len(shown_s) > 1 else 1.0 / spec.fps
    stop_s = shown_s[-1] + frame_s if end_s is None else min(end_s, shown_s[-1] + frame_s)
    # A millisecond of slack: containers round their timestamps.
    num = min(spec.max_frames, int((stop_s - start_s) * spec.fps + 1e-3))
    if num < 1:
        raise Reject("no_frames", f"{stop_s:.2f} s of video, asked from {start_s:.2f} s at {spec.fps} fps")
    times = start_s + np.arange(num) / spec.fps
    return np.clip(np.searchsorted(shown_s, times + 1e-3, side="right") - 1, 0, len(shown_s) - 1)


def _read_decord(source: str | bytes, spec: VideoSpec, start_s: float, end_s: float | None) -> np.ndarray:
    import decord

    reader = decord.VideoReader(io.BytesIO(source) if isinstance(source, bytes) else source, num_threads=1)
    shown_s = np.asarray(reader.get_frame_timestamp(np.arange(len(reader))))[:, 0]
    indices = _times_to_indices(shown_s - shown_s[0], spec, start_s, end_s)
    frames = reader.get_batch(indices).asnumpy()
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames of shape {frames.shape}")
    return frames


def _read_pyav(source: str | bytes, spec: VideoSpec, start_s: float, end_s: float | None) -> np.ndarray:
    import av

    with av.open(io.BytesIO(source) if isinstance(source, bytes) else source) as container:
        if not container.streams.video:
            raise Reject("no_frames", "there is no video stream")
        shown, images = [], []
        stop = None if end_s is None else end_s + 1.0
        for frame in container.decode(video=0):
            shown.append(frame.time if frame.time is not None else len(shown) / float(frame.rate or spec.fps))
            images.append(frame.to_ndarray(format="rgb24"))
            if stop is not None and shown[-1] - shown[0] > stop:
                break
    shown_s = np.asarray(shown) - (shown[0] if shown else 0.0)
    return np.stack([images[i] for i in _times_to_indices(shown_s, spec, start_s, end_s)])


def _resize(frames: np.ndarray, short_side: int) -> np.ndarray:
    if min(frames.shape[1:3]) == short_side:
        return frames
    return np.stack([np.asarray(resize_short_side(Image.fromarray(f), short_side)) for f in frames])


def decode_sound_track(path: str, spec: AudioSpec, *, start_s: float = 0.0, end_s: float | None = None) -> np.ndarray:
    """(samples,) float32 mono at ``spec.sample_rate_hz`` from a video file's sound track."""
    import decord

    source = local_path_or_bytes(path)
    try:
        # FFmpeg resamples here: decord does not tell the track's own rate.
        reader = decord.AudioReader(
            io.BytesIO(source) if isinstance(source, bytes) else source, sample_rate=spec.sample_rate_hz, mono=True
        )
        # Its public indexing copies through Python lists at three times the cost of decoding.
        samples = np.asarray(reader._array)
    except Exception as e:
        raise Reject("no_sound", f"decord: {' '.join(str(e).split())[:120]}") from e
    return to_mono(samples.T, rate=spec.sample_rate_hz, spec=spec, start_s=start_s, end_s=end_s)
