"""Frames, samples and texts → the tokens of an exported model, by the numbers of its config.json.

A copy goes with every exported model and runs without the package that trained it. Tokens are those of the model's
evaluation: of vision to the bit, of sound within the rounding of float32.
"""

from __future__ import annotations

import importlib
import math
import re

import numpy as np
import scipy.fft

from .decoding_imp import pillow


def grid_positions(grid: tuple[int, ...], rows: list[int]) -> np.ndarray:
    """(N, axes) int64: the rows of the position tables of a grid's tokens."""
    axes = [np.arange(n) * r // n for n, r in zip(grid, rows, strict=True)]
    return np.stack([a.ravel() for a in np.meshgrid(*axes, indexing="ij")], axis=-1)


def vision_tokens(frames: np.ndarray, variant: dict, model: dict) -> tuple[np.ndarray, np.ndarray]:
    """(T, H, W, 3) uint8 → tokens (N, P) uint8 and positions (N, 3) of the middle of the clip and of each frame."""
    count, size = max(1, variant["num_frames"]), variant["size"]
    start = max(0, len(frames) - count) // 2
    frames = frames[np.minimum(np.arange(start, start + count), len(frames) - 1)]
    frames = np.stack([_middle_square(frame, size) for frame in frames])
    time, height, width = model["vision_patch"]
    time = time if variant["num_frames"] else 1
    grid = (count // time, size // height, size // width)
    cut = frames.reshape(grid[0], time, grid[1], height, grid[2], width, 3).transpose(0, 2, 4, 1, 3, 5, 6)
    return cut.reshape(math.prod(grid), -1), grid_positions(grid, model["vision_positions"])


def _middle_square(frame: np.ndarray, size: int) -> np.ndarray:
    height, width = frame.shape[:2]
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    if side == size and left == int(left) and top == int(top):
        return frame[int(top) : int(top) + size, int(left) : int(left) + size]
    image = pillow().fromarray(np.ascontiguousarray(frame))
    return np.asarray(image.resize((size, size), 2, box=(left, top, left + side, top + side)))  # 2: bilinear


def sound_tokens(samples: np.ndarray, settings: dict, model: dict) -> tuple[np.ndarray, np.ndarray]:
    """(samples,) float32 → tokens (N, P) float32 and positions (N, 2) of the log-mel spectrogram of its beginning."""
    mel = (log_mel(samples, settings) - settings["mean"]) / settings["std"]
    time, bands = settings["patch"]
    grid = (mel.shape[0] // time, mel.shape[1] // bands)
    cut = mel.reshape(grid[0], time, grid[1], bands).transpose(0, 2, 1, 3).reshape(math.prod(grid), -1)
    return cut.astype(np.float32), grid_positions(grid, model["audio_positions"])


def log_mel(samples: np.ndarray, s: dict) -> np.ndarray:
    """(num_frames, num_mels): magnitudes in float32 as in training, where rounding decides the quietest bands."""
    frame, hop, count = s["frame_length"], s["hop_length"], s["num_frames"]
    samples = samples[: (count - 1) * hop + (hop if s["pad_value"] is None else frame)]
    padded = np.zeros((count - 1) * hop + frame, np.float32)
    padded[: len(samples)] = samples
    frames = np.lib.stride_tricks.sliding_window_view(padded, frame)[::hop]
    if s["remove_dc"]:
        frames = frames - frames.mean(axis=-1, keepdims=True)
    if s["preemphasis"]:
        before = np.concatenate([frames[:, :1], frames[:, :-1]], axis=-1)
        frames = frames - s["preemphasis"] * before
    window = np.hanning(frame + (s["window"] == "periodic"))[:frame].astype(np.float32)
    parts = np.square(scipy.fft.rfft(frames * window, n=s["fft_length"], axis=-1).view(np.float32))
    power = parts[:, 0::2] + parts[:, 1::2]
    spectrum = power if s["power"] == 2 else np.sqrt(power)
    mel = np.log(np.maximum(spectrum.astype(np.float64) @ mel_filters(s) + s["log_offset"], s["log_floor"]))
    if s["pad_value"] is not None:
        mel[max(0, 1 + (len(samples) - frame) // hop) :] = s["pad_value"]
    return mel


def mel_filters(s: dict) -> np.ndarray:
    """(frequencies, num_mels) triangles: "slaney" of equal area (librosa's), "htk" of equal height."""
    length = s["fft_length"] or s["frame_length"]
    if s["mel_scale"] == "slaney":
        sizes = {"sr": s["sample_rate_hz"], "n_fft": length, "n_mels": s["num_mels"]}
        return importlib.import_module("librosa").filters.mel(fmin=s["min_hz"], fmax=s["max_hz"], **sizes).T
    hz = np.arange(length // 2 + 1) * s["sample_rate_hz"] / length
    low, high = 1127 * np.log1p(np.array([s["min_hz"], s["max_hz"]]) / 700)
    place = (1127 * np.log1p(hz / 700) - low) / (high - low) * (s["num_mels"] + 1)
    return np.maximum(0.0, 1 - np.abs(place[:, None] - np.arange(1, s["num_mels"] + 1))).astype(np.float32)


class Tokenizer:
    """A sentencepiece model or a tokenizer.json: ids of texts, with 0 for padding alone."""

    def __init__(self, model: bytes) -> None:
        self._shift = 0
        if not model.startswith(b"{"):
            self._encode = importlib.import_module("sentencepiece").SentencePieceProcessor(model_proto=model).encode
            return
        tokenizer = importlib.import_module("tokenizers").Tokenizer.from_buffer(model)
        first, padding = tokenizer.id_to_token(0), tokenizer.padding
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        named = padding is not None and padding["pad_id"] == 0 and padding["pad_token"] == first
        is_pad = first is None or named or re.fullmatch(r"[<\[]\|?pad(ding)?\|?[>\]]", first, re.IGNORECASE)
        # Where id 0 is a token of texts, all ids are one higher than the file's.
        self._shift = 0 if is_pad else 1
        self._encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids

    def ids(self, text: str, length: int) -> list[int]:
        """The first ``length`` tokens of a text. Raises ValueError for a text without any."""
        found = [i + self._shift for i in self._encode(text) if i + self._shift][:length]
        if not found:
            raise ValueError(f"no tokens in {text[:40]!r}")
        return found
