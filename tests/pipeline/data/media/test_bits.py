"""The same bits wherever a sample is decoded: threads, alignment and instruction sets change none of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__
from PIL import Image

from pipeline.data.media.machine import cpu_kind

_SIZE, _RATE_HZ = (162, 120), 48_000


def picture(number: int) -> np.ndarray:
    y, x = np.mgrid[: _SIZE[1], : _SIZE[0]]
    waves = [np.sin((x + 3 * number) / 9), np.cos(y / 7 + number / 5), np.sin((x + y) / 23 + number)]
    noise = np.random.default_rng(number).normal(0, 8, (*_SIZE[::-1], 3))
    return (127 + 110 * np.stack(waves, axis=-1) + noise).clip(0, 255).astype(np.uint8)


def sound() -> np.ndarray:
    """(samples, 2) float32: two seconds of two tones in noise."""
    t = np.arange(2 * _RATE_HZ) / _RATE_HZ
    tones = np.stack([0.4 * np.sin(2770 * t * (1 + t / 7)), 0.3 * np.sin(7750 * t)], axis=1)
    return (tones + np.random.default_rng(0).normal(0, 0.05, tones.shape)).astype(np.float32)


def write_film(path: Path, video_codec: str, options: dict, audio_codec: str) -> None:
    wave = np.ascontiguousarray(sound()[:_RATE_HZ].T)
    with av.open(str(path), "w") as container:
        video = container.add_stream(video_codec, rate=8, options=options)
        video.width, video.height, video.pix_fmt = *_SIZE, "yuv420p"
        audio = container.add_stream(audio_codec, rate=_RATE_HZ, layout="stereo")
        pictures = [av.VideoFrame.from_ndarray(picture(i), format="rgb24") for i in range(6)]
        sounds = [
            av.AudioFrame.from_ndarray(np.ascontiguousarray(wave[:, i : i + 1024]), format="fltp", layout="stereo")
            for i in range(0, wave.shape[1], 1024)
        ]
        for stream, frames, rate, step in ((video, pictures, 8, 1), (audio, sounds, _RATE_HZ, 1024)):
            for number, frame in enumerate([*frames, None]):
                if frame is not None:
                    frame.pts, frame.time_base = number * step, Fraction(1, rate)
                if frame is not None and stream is audio:
                    frame.sample_rate = rate
                container.mux(stream.encode(frame))


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bits")
    for ending in ("png", "jpg", "webp"):
        Image.fromarray(picture(0)).save(folder / f"image.{ending}")
    write_film(folder / "video.mp4", "libx264", {"preset": "ultrafast", "threads": "1"}, "aac")
    write_film(folder / "video.avi", "mpeg4", {}, "ac3")
    for name, rate_hz in (("a.wav", 44_100), ("a.flac", 48_000), ("a.mp3", 44_100), ("a.ogg", 48_000)):
        soundfile.write(folder / name, sound(), rate_hz)
    return folder


def start(folder: Path, *, threads: int, instructions: str, shift: int = 0, **environment: str) -> subprocess.Popen:
    numbers = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "OPENBLAS", "MKL", "SOXR")}
    command = [sys.executable, "-m", "tests.decoded_bits", str(folder)]
    return subprocess.Popen(
        [*command, json.dumps({"shift": shift, "instructions": instructions})],
        stdout=subprocess.PIPE,
        env=os.environ | numbers | environment,
        text=True,
    )


def test_threads_alignment_and_instruction_sets_change_no_bit(media):
    """numpy's, libjpeg's, glibc's and FFmpeg's instruction sets are switched off, as on an older CPU."""
    ours = [name for name in __cpu_dispatch__ if __cpu_features__[name]]
    newest = [name for name in ours if "512" in name or name == "X86_V4"]
    plain_libm = "glibc.cpu.hwcaps=-AVX2,-FMA,-AVX512F,-AVX512VL"
    started = [
        start(media, threads=1, instructions="all"),
        start(media, threads=2, instructions="avx2", shift=1, NPY_DISABLE_CPU_FEATURES=" ".join(newest)),
        start(
            media,
            threads=4,
            instructions="sse2",
            shift=3,
            NPY_DISABLE_CPU_FEATURES=" ".join(ours),
            JSIMD_FORCENONE="1",
            GLIBC_TUNABLES=plain_libm,
        ),
    ]
    found = [json.loads(process.communicate()[0]) for process in started]
    assert len(found[0]) == 15
    assert found[1] == found[0]
    assert found[2] == found[0]


def test_the_kind_of_cpu_is_one_short_line():
    kind = cpu_kind()
    assert kind.startswith(os.uname().machine) and "\n" not in kind and len(kind) < 200
    assert re.search(rf"av {re.escape(av.__version__)}, .*numpy {re.escape(np.__version__)}", kind)
