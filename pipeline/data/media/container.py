"""Media containers (MP4, Matroska, ...) by PyAV: opened, capped, and read packet by packet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from pipeline.data.media.decoders import as_file, check_cap
from pipeline.data.media.errors import Reject
from pipeline.errors import one_line

# Container formats that FFmpeg may detect. It knows hundreds, among them lists of other files (concat, hls, dash),
# network sessions (sdp), devices, texts and numbered images: a media file must not open another one.
FORMATS = (
    *("mov", "matroska", "avi", "mpeg", "mpegts", "mpegvideo", "asf", "flv", "ogg", "ivf", "mxf", "nut", "dv", "gif"),
    *("h264", "hevc", "av1", "m4v", "mjpeg", "yuv4mpegpipe"),
    *("wav", "w64", "aiff", "au", "caf", "mp3", "flac", "aac", "ac3", "eac3", "amr", "ape", "tta", "wv", "voc"),
)
# Plain words for misleading messages of FFmpeg. ``storage.confirm_readable`` tells failing storage apart.
_PLAIN = {
    "Invalid data found when processing input": "damaged, or neither sound nor video",
    "End of file": "the file ends too early",
    "Input/output error": "the file ends too early",
}
T = TypeVar("T")
_OPTIONS = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"}


def open_container(source: str | bytes) -> Any:
    """An open file of PyAV, one of ``FORMATS``. Raises Reject for any other file."""
    import av

    try:
        return _or_reject(lambda: av.open(as_file(source), container_options=_OPTIONS))
    except Reject as e:
        if isinstance(e.__cause__, av.error.ArgumentError):
            raise Reject("not_decodable", "PyAV: none of the formats that are read, or damaged") from e
        raise


def decodable(stream: Any) -> Any:
    """The stream itself. Raises Reject if FFmpeg has no decoder for it: it then lacks most of its attributes."""
    if stream.codec_context is None:
        raise Reject("not_decodable", f"PyAV: no decoder for the codec of its {stream.type} stream")
    return stream


def check_duration(container, stream, *, max_duration_s: float) -> None:
    """Raises Reject if the container or the stream declares a duration beyond the cap. Many declare none."""
    import av

    declared = [container.duration / av.time_base] if container.duration else []
    if stream.duration and stream.time_base:
        declared.append(float(stream.duration * stream.time_base))
    check_cap(max(declared, default=0.0), max_duration_s, reason="too_long", what="s")


def start_of(stream) -> float | None:
    """Time of a stream's first packet in seconds; None if the container does not declare it."""
    return None if stream.start_time is None else float(stream.start_time * stream.time_base)


def seek(container, stream, time_s: float) -> bool:
    """Seeks to the last key frame before ``time_s`` on the container's clock. Returns whether it could."""
    try:
        container.seek(int(time_s / stream.time_base), stream=stream)
    except (OSError, ValueError):
        return False
    return True


def packets(container, stream) -> Iterator:
    """The stream's packets in file order. Raises Reject at one that is truncated or cannot be read."""
    found = container.demux(stream)
    while (packet := _or_reject(lambda: next(found, None))) is not None:
        if packet.is_corrupt:
            raise Reject("not_decodable", "the file is cut short")
        yield packet


def frames(container, stream) -> Iterator:
    """Decoded frames in display order. Raises Reject at damage that the demuxer or decoder reports."""
    for packet in packets(container, stream):
        yield from _or_reject(packet.decode)


def _or_reject(step: Callable[[], T]) -> T:
    try:
        return step()
    except MemoryError:
        raise
    except Exception as e:
        # FFmpeg's own message, without the path and the number.
        message = getattr(e, "strerror", None) or one_line(e)
        raise Reject("not_decodable", f"PyAV: {_PLAIN.get(message, message)[:120]}") from e
