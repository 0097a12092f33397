"""Digests of what this process decodes, as JSON: python -m tests.decoded_bits FOLDER SETTINGS.

SETTINGS, as JSON too: ``shift`` moves arrays and files in memory by that many values; ``instructions`` is how much of
the CPU FFmpeg may use: "all", "avx2" (no AVX-512) or "sse2" (for pictures; sound stays at "avx2").
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import platform
import sys
from pathlib import Path

import av
import numpy as np

from pipeline.data.media.audio import decode_audio
from pipeline.data.media.image import decode_image
from pipeline.data.media.video import decode_video
from pipeline.data.spec import AUDIO_PRESETS, AudioSpec, ImageSpec, VideoSpec
from pipeline.data.tokens import spectrogram_tokens

# Bits of libavutil's cpu.h.
_ALLOWED = {"avx2": 0x7FFFF, "sse2": 0x1019}


def _allow(instructions: str) -> None:
    folder = Path(av.__file__).parent.parent / "av.libs"
    library = next(folder.glob("libavutil*"), None) if platform.machine() == "x86_64" else None
    if library and instructions in _ALLOWED:
        libavutil = ctypes.CDLL(str(library))
        libavutil.av_force_cpu_flags(-1)
        libavutil.av_force_cpu_flags(libavutil.av_get_cpu_flags() & _ALLOWED[instructions])


def _moved(array: np.ndarray, shift: int) -> np.ndarray:
    room = np.empty(array.size + shift, array.dtype)
    room[shift:] = array
    return room[shift:]


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def digests(folder: Path, *, shift: int, instructions: str) -> dict[str, str]:
    out, held = {}, bytearray(shift)
    _allow(instructions)
    for path in sorted(folder.iterdir()):
        if path.name.startswith("image"):
            out[path.name] = _digest(decode_image(str(path), ImageSpec(short_side=96)))
        if path.name.startswith("video"):
            for side in (64, 120):
                out[f"{path.name} {side}"] = _digest(decode_video(path.read_bytes(), VideoSpec(short_side=side)))
    _allow("avx2" if instructions == "sse2" else instructions)
    for path in sorted(folder.iterdir()):
        if not path.name.startswith("image"):
            out[f"{path.name} sound"] = _digest(decode_audio(path.read_bytes(), AudioSpec()))
    for name, spec in AUDIO_PRESETS.items():
        wave = np.random.default_rng(1).standard_normal(spec.num_samples).astype(np.float32)
        # librosa, which has the other filters, is slow to import.
        spec = dataclasses.replace(spec, mel_scale="htk")
        out[f"spectrogram {name}"] = _digest(spectrogram_tokens(_moved(wave, shift), spec))
    del held
    return out


if __name__ == "__main__":
    print(json.dumps(digests(Path(sys.argv[1]), **json.loads(sys.argv[2]))))
