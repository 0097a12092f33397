"""Video frames by PyAV (default) or decord.

PyAV seeks to the clip, stops after it and resizes while converting; benchmarks/decode.py compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data.media.audio import clip_times
from pipeline.data.media.container import (
    check_duration,
    decodable,
    frames,
    open_container,
    packets,
    seek,
    start_of,
)
from pipeline.data.media.decoders import as_file, check_array, check_cap, run
from pipeline.data.media.errors import Reject
from pipeline.data.media.image import canonical_size, resize_short_side
from pipeline.data.media.part import Part
from pipeline.data.spec import VideoSpec

# Maximum rounding of containers' timestamps, in seconds.
_SLACK_S = 1e-3


def decode(source: str | bytes, spec: VideoSpec, part: Part) -> np.ndarray:
    """``decode_video``, as ``modalities`` calls it."""
    return decode_video(source, spec, start_s=part.start_s, end_s=part.end_s)


def decode_video(
    source: str | bytes, spec: VideoSpec, *, start_s: float = 0.0, end_s: float | None = None
) -> np.ndarray:
    """(T, H, W, 3) uint8: at each time start_s + i / fps the last frame shown by then, at most ``max_frames``."""
    start_s, end_s = clip_times(start_s, end_s)
    clip = run(spec.decoder, source, spec, built_in=BUILT_IN, start_s=start_s, end_s=end_s)
    return canonical_frames(check_array(clip, dtype=np.uint8, ndim=4, what="uint8 (T, H, W, 3)"), spec)


def canonical_frames(clip: np.ndarray, spec: VideoSpec) -> np.ndarray:
    """(T, H, W, 3) uint8 at the spec's rate, cut and resized to a canonical clip."""
    clip = clip[: spec.max_frames]
    if min(clip.shape[1:3]) == spec.short_side:
        return clip
    _canonical_size(clip.shape[2], clip.shape[1], spec)
    return np.stack([np.asarray(resize_short_side(Image.fromarray(f), spec.short_side)) for f in clip])


def _read_pyav(source: str | bytes, spec: VideoSpec, *, start_s: float, end_s: float | None) -> np.ndarray:
    clip = _read_from(source, spec, start_s, end_s, seeking=True) if start_s > 0 else None
    return _read_from(source, spec, start_s, end_s, seeking=False) if clip is None else clip


def _read_from(source, spec: VideoSpec, start_s: float, end_s: float | None, *, seeking: bool) -> np.ndarray | None:
    """The clip; None if seeking went past its start, as in containers without an index."""
    with open_container(source) as container:
        stream = _video_stream(container, spec)
        zero_s = start_of(stream)
        if seeking and (zero_s is None or not seek(container, stream, zero_s + start_s)):
            return None
        clip = _ClipBuilder(spec, start_s, end_s)
        for number, frame in enumerate(frames(container, stream)):
            time_s = frame.time if frame.time is not None else number / spec.fps
            zero_s = time_s if zero_s is None else zero_s
            if seeking and number == 0 and time_s - zero_s > start_s + _SLACK_S:
                return None
            check_cap(frame.width * frame.height, spec.max_pixels, reason="too_large", what="pixels a frame")
            if clip.add(frame, time_s - zero_s):
                break
        return clip.frames()


def _video_stream(container: Any, spec: VideoSpec) -> Any:
    """The container's first video stream. Raises Reject if there is none or it exceeds a cap."""
    if not container.streams.video:
        raise Reject("no_frames", "no video stream")
    stream = decodable(container.streams.video[0])
    # A machine runs many decode processes; more threads would only add context switches.
    stream.thread_type, stream.thread_count = "NONE", 1
    check_cap(
        (stream.width or 0) * (stream.height or 0),
        spec.max_pixels,
        reason="too_large",
        what=f"pixels a frame ({stream.width}x{stream.height})",
    )
    check_cap(stream.frames or 0, spec.max_source_frames, reason="too_long", what="frames")
    check_duration(container, stream, max_duration_s=spec.max_duration_s)
    return stream


class _ClipBuilder:
    """Takes frames in display order and keeps those at the clip's times: a whole film does not fit into memory."""

    def __init__(self, spec: VideoSpec, start_s: float, end_s: float | None):
        self._spec = spec
        self._start_s = start_s
        self._end_s = end_s
        self._shown_s: list[float] = []
        self._pictures: list[np.ndarray] = []
        self._current = None
        self._picture: np.ndarray | None = None
        self._size: tuple[int, int] | None = None
        self._convert_to_rgb = _converter()

    def add(self, frame, shown_s: float) -> bool:
        """Adds a frame. Returns whether the clip is complete."""
        # All times before this frame show the previous one.
        while self._current is not None and not self._full() and self._due() < shown_s:
            self._pictures.append(self._convert())
        self._current, self._picture = frame, None
        self._shown_s.append(shown_s)
        return self._full() or (self._end_s is not None and shown_s > self._end_s + 1.0)

    def frames(self) -> np.ndarray:
        end = float("inf") if self._full() else video_end(np.asarray(self._shown_s), self._spec)
        num = num_frames(end, self._spec, self._start_s, self._end_s)
        while len(self._pictures) < num:
            self._pictures.append(self._convert())
        return np.stack(self._pictures[:num])

    def _full(self) -> bool:
        return len(self._pictures) == self._spec.max_frames

    def _due(self) -> float:
        return self._start_s + len(self._pictures) / self._spec.fps + _SLACK_S

    def _convert(self) -> np.ndarray:
        """The current frame as RGB: converted and resized in one pass, rotated as the container says."""
        if self._picture is None:
            frame = self._current
            # One size for the whole clip, even if later frames differ.
            self._size = self._size or _canonical_size(frame.width, frame.height, self._spec)
            width, height = self._size
            self._picture = np.rot90(self._convert_to_rgb(frame, width, height), round(frame.rotation / 90))
        return self._picture


def _converter() -> Callable[..., np.ndarray]:
    """A function (frame, width, height) → (height, width, 3) uint8; faster if reused for all frames of a clip."""
    from av.video.reformatter import Interpolation, VideoReformatter

    swscale = VideoReformatter()
    # Without the last two flags the last bit depends on the CPU's instruction sets.
    how = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.BITEXACT

    def convert(frame, width: int, height: int) -> np.ndarray:
        rgb = swscale.reformat(frame, format="rgb24", width=width, height=height, interpolation=how, threads=1)
        return rgb.to_ndarray()

    return convert


def _canonical_size(width: int, height: int, spec: VideoSpec) -> tuple[int, int]:
    """(width, height) of the clip's frames. Raises Reject beyond the cap: a thin strip may grow a thousandfold."""
    width, height = canonical_size((width, height), spec.short_side)
    check_cap(width * height, spec.max_pixels, reason="too_large", what=f"pixels a frame at {width}x{height}")
    return width, height


def video_end(shown_s: np.ndarray, spec: VideoSpec) -> float:
    """Time at which the last frame ends. shown_s: time at which each frame is first shown, ascending."""
    if not len(shown_s):
        raise Reject("no_frames", "the video has no frames")
    frame_s = float(np.median(np.diff(shown_s))) if len(shown_s) > 1 else 1.0 / spec.fps
    return float(shown_s[-1]) + frame_s


def num_frames(video_end_s: float, spec: VideoSpec, start_s: float, end_s: float | None) -> int:
    """The number of frames of the clip."""
    stop_s = video_end_s if end_s is None else min(end_s, video_end_s)
    if stop_s <= start_s + _SLACK_S:
        raise Reject("no_frames", f"{stop_s:.2f} s of video, asked from {start_s:.2f} s")
    # At least the first frame, however short the clip.
    return int(max(1, min(spec.max_frames, (stop_s - start_s) * spec.fps + _SLACK_S)))


def frame_indices(shown_s: np.ndarray, spec: VideoSpec, start_s: float, end_s: float | None) -> np.ndarray:
    """Frame numbers of the clip's times."""
    times = start_s + np.arange(num_frames(video_end(shown_s, spec), spec, start_s, end_s)) / spec.fps
    return np.clip(np.searchsorted(shown_s, times + _SLACK_S, side="right") - 1, 0, len(shown_s) - 1)


def _read_decord(source: str | bytes, spec: VideoSpec, *, start_s: float, end_s: float | None) -> np.ndarray:
    """Frames by decord, or by PyAV for good files that decord cannot read (it fails on some widths)."""
    _refuse_torn(source, spec, stop_s=start_s + spec.max_frames / spec.fps)
    try:
        return _decord_frames(source, spec, start_s, end_s)
    except (Reject, MemoryError):
        raise
    except Exception:
        return _read_pyav(source, spec, start_s=start_s, end_s=end_s)


def _decord_frames(source: str | bytes, spec: VideoSpec, start_s: float, end_s: float | None) -> np.ndarray:
    import decord

    reader = decord.VideoReader(as_file(source), num_threads=1)
    shown_s = np.asarray(reader.get_frame_timestamp(np.arange(len(reader))))[:, 0]
    clip = reader.get_batch(frame_indices(shown_s - shown_s[0], spec, start_s, end_s)).asnumpy()
    if clip.ndim != 4 or clip.shape[-1] != 3:
        raise ValueError(f"frames of shape {clip.shape}")
    return clip


def _refuse_torn(source: str | bytes, spec: VideoSpec, *, stop_s: float) -> None:
    """Rejects a file with truncated packets before ``stop_s``.

    decord's threads notice a torn packet only sometimes, and a resumed run must meet the same rejects.
    """
    with open_container(source) as container:
        stream = _video_stream(container, spec)
        first_s = start_of(stream) or 0.0
        for packet in packets(container, stream):
            if packet.pts is not None and float(packet.pts * packet.time_base) - first_s > stop_s + 1.0:
                return


BUILT_IN = {"pyav": _read_pyav, "decord": _read_decord}
