"""Files broken in every known way, each with the reasons for which it may be rejected."""

from __future__ import annotations

import dataclasses
import functools
import io
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import soundfile
from PIL import Image


@dataclasses.dataclass(frozen=True)
class Kind:
    """make: (good file's bytes, number) → the broken file's. reasons: those of the fixed list that it may get."""

    name: str
    make: Callable[[bytes, int], bytes]
    reasons: tuple[str, ...]


def good_image(number: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (9, 12, 3), np.uint8)
    Image.fromarray(pixels).resize((64, 48), Image.BICUBIC).save(out, "JPEG")
    return out.getvalue()


def good_video(number: int, *, faststart: bool = True, sound: bool = True) -> bytes:
    return _encode_video(number, range(12), faststart=faststart, sound=sound)


def good_sound(number: int) -> bytes:
    out, times = io.BytesIO(), np.arange(8000) / 16_000
    soundfile.write(out, 0.5 * np.sin(2 * np.pi * (200 + number % 1000) * times), 16_000, format="FLAC")
    return out.getvalue()


def _encode_video(number: int, times, *, faststart=True, sound=True, size=(64, 48), fps=12) -> bytes:
    """times: of the frames in 1 / fps s."""
    rng, options = np.random.default_rng(number), {"movflags": "faststart"} if faststart else {}
    # The index can be put first only where the file can be read again.
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        _mux_video(file.name, options, rng, number, times, sound, size, fps)
        return file.read()


def _mux_video(path: str, options: dict, rng, number: int, times, sound: bool, size, fps: int) -> None:
    with av.open(path, "w", options=options) as container:
        video = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "threads": "1", "g": "6"})
        video.width, video.height = size
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=16_000, layout="mono") if sound else None
        picture = np.ascontiguousarray(np.broadcast_to(rng.integers(0, 256, 3, np.uint8), (size[1], size[0], 3)))
        for time in times:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = time
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio:
            for start in range(0, 16_000, 1024):
                samples = 0.3 * np.sin(np.arange(start, start + 1024) * (0.1 + number % 7 / 50))
                frame = av.AudioFrame.from_ndarray(samples[None].astype(np.float32), format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 16_000, start
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))


def _sound_only_mp4() -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        audio = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    return out.getvalue()


@functools.cache
def _eight_k() -> bytes:
    return _encode_video(0, range(1), size=(7680, 4320), sound=False)


def _frameless_mp4(good: bytes, number: int) -> bytes:
    """Its sample tables say zero samples."""
    return _patched(good, b"stsz", 8, struct.pack(">I", 0))


def _patched(content: bytes, box: bytes, offset: int, value: bytes) -> bytes:
    """Every ``box`` of an MP4 with other bytes at an offset of its content."""
    content, at = bytearray(content), content.find(box)
    while at >= 0:
        content[at + 4 + offset : at + 4 + offset + len(value)] = value
        at = content.find(box, at + 4)
    return bytes(content)


def png(width: int, height: int, data: bytes, *, depth: int = 8) -> bytes:
    """depth: bits of each of a pixel's three values."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def _noise(good: bytes, number: int) -> bytes:
    return np.random.default_rng(number).bytes(len(good))


def _nan_wav(good: bytes, number: int) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.full(1000, np.nan, np.float32), 16_000, format="WAV", subtype="FLOAT")
    return out.getvalue()


def _wav_of_hours(good: bytes, number: int) -> bytes:
    """Ten hours of 8 kHz that are really there: 288 MB of zeros, which a sparse file does not store."""
    samples = 10 * 3600 * 8000
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, 8000, 8000, 1, 8)
    return struct.pack("<4sI4s", b"RIFF", 36 + samples, b"WAVE") + form + struct.pack("<4sI", b"data", samples)


def _empty_wav(good: bytes, number: int) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.zeros((0, 1)), 16_000, format="WAV")
    return out.getvalue()


_BAD = ("not_decodable",)
_DEADLY = [
    Kind("segfault", lambda good, n: b"SEGV", ("crashed",)),
    Kind("hang", lambda good, n: b"LOCK", ("hung",)),
]
_EVERYWHERE = [
    Kind("empty", lambda good, n: b"", ("empty_file",)),
    Kind("text", lambda good, n: b"<html>404 not found</html>" * 20, _BAD),
    Kind("noise", _noise, _BAD),
]
IMAGES = [
    *_EVERYWHERE,
    Kind("truncated", lambda good, n: good[: len(good) // 2], _BAD),
    Kind("a video under another name", lambda good, n: good_video(n), _BAD),
    Kind("decompression bomb", lambda good, n: png(20_000, 20_000, bytes(1 << 20)), ("too_large",)),
    Kind("absurd header", lambda good, n: png(2**31 - 1, 2**31 - 1, b""), ("too_large", "not_decodable")),
    Kind("more memory than the machine has", lambda good, n: b"HUGE", ("out_of_memory",)),
    *_DEADLY,
]
VIDEOS = [
    *_EVERYWHERE,
    Kind("without its index", lambda good, n: good_video(n, faststart=False)[:3000], _BAD),
    Kind("cut short in its first picture", lambda good, n: good[: good.find(b"mdat") + 60], (*_BAD, "no_frames")),
    Kind("a picture under another name", lambda good, n: png(64, 48, bytes(48 * 193))[:60], _BAD),
    Kind("sound only", lambda good, n: _sound_only_mp4(), ("no_frames",)),
    Kind("no frames", _frameless_mp4, ("no_frames", "not_decodable")),
    Kind("ten hours", lambda good, n: _encode_video(n, range(0, 12 * 36_001, 12 * 3600)), ("too_long",)),
    Kind("8K", lambda good, n: _eight_k(), ("too_large",)),
    Kind("absurd header", lambda good, n: _patched(good, b"stsz", 12, b"\x7f" * 8), (*_BAD, "no_frames")),
    *_DEADLY,
]
SOUNDS = [
    *_EVERYWHERE,
    Kind("no samples", _empty_wav, ("no_sound",)),
    Kind("not finite", _nan_wav, _BAD),
    Kind("header only", lambda good, n: good[:40], _BAD),
    Kind("video without sound", lambda good, n: good_video(n, sound=False), ("no_sound",)),
    Kind("ten hours", _wav_of_hours, ("too_long",)),
    *_DEADLY,
]


GOOD = {"image": good_image, "video": good_video, "audio": good_sound}
BROKEN = {"image": IMAGES, "video": VIDEOS, "audio": SOUNDS}


def write_broken(path: Path, modality: str, kind: Kind, number: int) -> str:
    """Writes one broken file. A file of ten hours is sparse."""
    path.write_bytes(kind.make(GOOD[modality](number), number))
    if kind.make is _wav_of_hours:
        with open(path, "r+b") as file:
            file.truncate(44 + 10 * 3600 * 8000)
    return str(path)
