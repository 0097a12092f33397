"""Media for the benchmarks: made here, the same every time, none of it downloaded."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from PIL import Image


def write_video(path: Path, *, height: int, width: int, seconds: float, seed: int, gop: int = 50) -> str:
    """H.264 at 25 frames a second: a blocky picture that moves, as hard to decode as a film of its size."""
    rng = np.random.default_rng(seed)
    scene = np.kron(
        rng.integers(0, 256, (height // 8 + 40, width // 8 + 40, 3), np.uint8), np.ones((8, 8, 1), np.uint8)
    )
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": str(gop), "preset": "fast", "crf": "23"})
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv420p"
        for number in range(int(25 * seconds)):
            top, left = (3 * number) % 256, (5 * number) % 256
            picture = np.ascontiguousarray(scene[top : top + height, left : left + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return str(path)


def write_image(path: Path, *, height: int, width: int, seed: int) -> str:
    """A JPEG as cameras make them: smooth shapes and some grain."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((width, height), Image.BICUBIC)
    grain = rng.integers(-12, 13, (height, width, 1))
    Image.fromarray(np.clip(np.asarray(small) + grain, 0, 255).astype(np.uint8)).save(path, quality=90)
    return str(path)


def write_sound(path: Path, *, seconds: float, seed: int, rate_hz: int = 44_100) -> str:
    """Stereo FLAC of noise under a moving tone."""
    rng, times = np.random.default_rng(seed), np.arange(int(seconds * rate_hz)) / rate_hz
    tone = 0.3 * np.sin(2 * np.pi * (300 + 40 * times) * times)[:, None]
    soundfile.write(path, (tone + 0.05 * rng.standard_normal((len(times), 2))).astype(np.float32), rate_hz)
    return str(path)


def write_manifest(path: Path, rows: list[dict]) -> str:
    """A manifest of rows with the same keys."""
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)
