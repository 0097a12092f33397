"""Media containers (MP4, Matroska, ...) by PyAV: opened, capped, and read packet by packet."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pipeline.data.media.decoders import as_file, check_cap
from pipeline.data.media.errors import Reject
from pipeline.errors import one_line


def open_container(source: str | bytes):
    """An open file of PyAV. Raises Reject where it is none."""
    import av

    return _or_reject(lambda: av.open(as_file(source)))


def check_duration(container, stream, *, max_duration_s: float) -> None:
    """Raises Reject where the container or the stream says that it is longer than the cap. Many say nothing."""
    import av

    said = [container.duration / av.time_base] if container.duration else []
    if stream.duration and stream.time_base:
        said.append(float(stream.duration * stream.time_base))
    check_cap(max(said, default=0.0), max_duration_s, reason="too_long", what="s")


def start_of(stream) -> float | None:
    """Time of a stream's first packet in seconds; None where the container does not say."""
    return None if stream.start_time is None else float(stream.start_time * stream.time_base)


def seek(container, stream, time_s: float) -> bool:
    """Goes to the last key frame before ``time_s`` (on the container's own clock), where the container can."""
    try:
        container.seek(int(time_s / stream.time_base), stream=stream)
    except (OSError, ValueError):
        return False
    return True


def packets(container, stream) -> Iterator:
    """The stream's packets as they lie in the file. Raises Reject at one that is cut short or cannot be read."""
    found = container.demux(stream)
    while (packet := _or_reject(lambda: next(found, None))) is not None:
        if packet.is_corrupt:
            raise Reject("not_decodable", "the file is cut short")
        yield packet


def frames(container, stream) -> Iterator:
    """Decoded frames in the order they are shown. Raises Reject at damage that the demuxer or decoder sees."""
    for packet in packets(container, stream):
        yield from _or_reject(packet.decode)


def _or_reject(step: Callable):
    try:
        return step()
    except MemoryError:
        raise
    except Exception as e:
        raise Reject("not_decodable", f"PyAV: {one_line(e)[:120]}") from e
