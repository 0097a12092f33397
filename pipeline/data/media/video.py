"""Video frames and sound tracks: decord first, PyAV where decord cannot."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipeline.data.media.audio import clip_times, to_mono
from pipeline.data.media.errors import Reject
from pipeline.data.media.image import resize_short_side
from pipeline.data.media.storage import local_path_or_bytes
from pipeline.data.spec import AudioSpec, VideoSpec

# Containers round their timestamps to less than this.
_SLACK_S = 1e-3


def decode_video(path: str, spec: VideoSpec, *, start_s: float = 0.0, end_s: float | None = None) -> np.ndarray:
    """(T, H, W, 3) uint8: at each time start_s + i / fps the last frame shown by then, at most ``max_frames``."""
    start_s, end_s = clip_times(start_s, end_s)
    source = local_path_or_bytes(path)
    _refuse_torn(source, stop_s=start_s + spec.max_frames / spec.fps)
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


def _open_pyav(source: str | bytes):
    import av

    return av.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _refuse_torn(source: str | bytes, *, stop_s: float) -> None:
    """Rejects a file whose packets are cut short before ``stop_s``.

    decord's threads notice a torn packet or not as luck has it, and a resumed run must meet the same rejects.
    Reading packets without decoding them costs a tenth of the decoding.
    """
    try:
        with _open_pyav(source) as container:
            if not container.streams.video:
                raise Reject("no_frames", "there is no video stream")
            first = None
            for packet in container.demux(video=0):
                if packet.is_corrupt:
                    raise Reject("not_decodable", "the file is cut short")
                if packet.pts is not None:
                    time_s = float(packet.pts * packet.time_base)
                    first = time_s if first is None else first
                    if time_s - first > stop_s + 1.0:
                        return
    except Reject:
        raise
    except Exception as e:
        raise Reject("not_decodable", f"PyAV: {' '.join(str(e).split())[:120]}") from e


def _video_end(shown_s: np.ndarray, spec: VideoSpec) -> float:
    """When the last frame stops being shown. shown_s: when each frame is first shown, from 0, ascending."""
    if not len(shown_s):
        raise Reject("no_frames", "the video has no frames")
    frame_s = float(np.median(np.diff(shown_s))) if len(shown_s) > 1 else 1.0 / spec.fps
    return float(shown_s[-1]) + frame_s


def _num_frames(video_end_s: float, spec: VideoSpec, start_s: float, end_s: float | None) -> int:
    """How many frames the clip has."""
    stop_s = video_end_s if end_s is None else min(end_s, video_end_s)
    if stop_s <= start_s + _SLACK_S:
        raise Reject("no_frames", f"{stop_s:.2f} s of video, asked from {start_s:.2f} s")
    # The first frame is due at once, however soon the clip ends.
    return int(max(1, min(spec.max_frames, (stop_s - start_s) * spec.fps + _SLACK_S)))


def _times_to_indices(shown_s: np.ndarray, spec: VideoSpec, start_s: float, end_s: float | None) -> np.ndarray:
    """Frame numbers of the clip's times."""
    times = start_s + np.arange(_num_frames(_video_end(shown_s, spec), spec, start_s, end_s)) / spec.fps
    return np.clip(np.searchsorted(shown_s, times + _SLACK_S, side="right") - 1, 0, len(shown_s) - 1)


def _read_decord(source: str | bytes, spec: VideoSpec, start_s: float, end_s: float | None) -> np.ndarray:
    import decord

    reader = decord.VideoReader(io.BytesIO(source) if isinstance(source, bytes) else source, num_threads=1)
    shown_s = np.asarray(reader.get_frame_timestamp(np.arange(len(reader))))[:, 0]
    frames = reader.get_batch(_times_to_indices(shown_s - shown_s[0], spec, start_s, end_s)).asnumpy()
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames of shape {frames.shape}")
    return frames


def _read_pyav(source: str | bytes, spec: VideoSpec, start_s: float, end_s: float | None) -> np.ndarray:
    """The same frames as decord's, keeping only those of the clip: a film does not fit into memory."""
    shown, images, current, first_s = [], [], None, None
    with _open_pyav(source) as container:
        for number, frame in enumerate(container.decode(video=0)):
            time_s = frame.time if frame.time is not None else number / spec.fps
            first_s = time_s if first_s is None else first_s
            shown.append(time_s - first_s)
            # Every time that falls before this frame shows the one before it.
            while (
                current is not None and len(images) < spec.max_frames and _due(len(images), spec, start_s) < shown[-1]
            ):
                images.append(current.to_ndarray(format="rgb24"))
            current = frame
            if len(images) == spec.max_frames or (end_s is not None and shown[-1] > end_s + 1.0):
                break
    whole = len(images) < spec.max_frames
    end = _video_end(np.asarray(shown), spec) if whole else float("inf")
    num = _num_frames(end, spec, start_s, end_s)
    while len(images) < num:
        images.append(current.to_ndarray(format="rgb24"))
    return np.stack(images[:num])


def _due(index: int, spec: VideoSpec, start_s: float) -> float:
    return start_s + index / spec.fps + _SLACK_S


def _resize(frames: np.ndarray, short_side: int) -> np.ndarray:
    if min(frames.shape[1:3]) == short_side:
        return frames
    return np.stack([np.asarray(resize_short_side(Image.fromarray(f), short_side)) for f in frames])


def decode_sound_track(
    path: str, spec: AudioSpec, *, start_s: float = 0.0, end_s: float | None = None, num_samples: int | None = None
) -> np.ndarray:
    """(samples,) float32 mono at ``spec.sample_rate_hz`` from a video file's sound track, as ``to_mono`` cuts it."""
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
    return to_mono(
        samples.T, rate=spec.sample_rate_hz, spec=spec, start_s=start_s, end_s=end_s, num_samples=num_samples
    )
