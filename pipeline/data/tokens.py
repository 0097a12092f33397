"""From arrays to tokens with positions. Shape letters: T frames, H W pixels, N tokens, P values of a patch.

A position is a row of the model's position tables: on an axis with n tokens and a table of b rows, token i has row
(i b) // n, so inputs of every size spread over the whole table (dilated, integer arithmetic).
"""

from __future__ import annotations

import functools
import math

import numpy as np
import scipy.fft
import scipy.sparse

from pipeline.data.spec import AudioSpec, TokenSpec


@functools.lru_cache(maxsize=64)
def grid_positions(grid: tuple[int, ...], buckets: tuple[int, ...]) -> np.ndarray:
    """(N, axes) int32, read-only, for a grid in row-major order.

    Raises ValueError if an axis has more tokens than rows.
    """
    too_many = [f"{n} tokens, {b} positions" for n, b in zip(grid, buckets, strict=True) if n > b]
    if too_many:
        raise ValueError(f"grid {grid} does not fit the position tables {buckets}: {'; '.join(too_many)}")
    axes = [np.arange(n) * b // n for n, b in zip(grid, buckets, strict=True)]
    positions = np.stack([a.ravel() for a in np.meshgrid(*axes, indexing="ij")], axis=-1).astype(np.int32)
    positions.flags.writeable = False
    return positions


def patchify(
    frames: np.ndarray,
    patch: tuple[int, int, int],
    *,
    keep: np.ndarray | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """(T, H, W, 3) → (N, P) of the same dtype, tubelets in (time, row, column) order, values in (t, h, w, c) order.

    keep: numbers of the tokens to take, all by default. out: array to write them into, a new one by default. The result
    never shares memory with the frames.
    """
    num_frames, height, width, channels = frames.shape
    t, h, w = patch
    if num_frames % t or height % h or width % w:
        raise ValueError(f"{num_frames}x{height}x{width} cannot be cut into patches of {t}x{h}x{w}")
    grid = (num_frames // t, height // h, width // w)
    cut = frames.reshape(grid[0], t, grid[1], h, grid[2], w, channels).transpose(0, 2, 4, 1, 3, 5, 6)
    if keep is not None:
        cut = cut[np.unravel_index(keep, grid)]
    if out is None:
        out = np.empty((int(np.prod(grid)) if keep is None else len(keep), t * h * w * channels), frames.dtype)
    out.reshape(cut.shape)[...] = cut
    return out


def image_tokens(pixels: np.ndarray, sizes: TokenSpec) -> tuple[np.ndarray, np.ndarray]:
    """(H, W, 3) uint8 RGB → tokens (N, P) uint8 and positions (N, 3) int32 of a still image.

    sizes: its patch and position tables; a ModelConfig has them under the same names.
    Raises ValueError for other arrays, and for sizes that are not whole patches or exceed the tables.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise ValueError(f"expected (height, width, 3) uint8 pixels, found {pixels.shape} {pixels.dtype}")
    _, h, w = sizes.vision_patch
    tokens = patchify(pixels[None], (1, h, w))
    return tokens, grid_positions((1, pixels.shape[0] // h, pixels.shape[1] // w), sizes.vision_positions)


def kept_tokens(num_tokens: int, drop_rate: float) -> int:
    """The number of tokens that DropToken keeps: int((1 - rate) N)."""
    # The small addition keeps e.g. (1 - 0.9) * 10 = 0.9999999999999998 from losing a token.
    return int((1.0 - drop_rate) * num_tokens + 1e-9)


def choose_tokens(num_tokens: int, *, drop_rate: float, rng: np.random.Generator) -> np.ndarray:
    """Numbers of the tokens that DropToken keeps: a uniform choice without replacement, ascending."""
    return np.sort(rng.choice(num_tokens, size=kept_tokens(num_tokens, drop_rate), replace=False))


@functools.cache
def mel_filters(spec: AudioSpec) -> np.ndarray:
    """(frequencies of the transform, num_mels) float32 triangles, each from its left to its right neighbour's centre.

    "slaney": librosa's, straight lines over Hz, each of area 1. "htk": HTK's and Kaldi's, mel = 1127 ln(1 + Hz / 700),
    straight lines over mel, each of height 1.
    """
    fft_length = spec.fft_length or spec.frame_length
    if spec.mel_scale == "slaney":
        import librosa

        return librosa.filters.mel(
            sr=spec.sample_rate_hz, n_fft=fft_length, n_mels=spec.num_mels, fmin=spec.min_hz, fmax=spec.max_hz
        ).T.astype(np.float32)
    hz = np.arange(fft_length // 2 + 1) * spec.sample_rate_hz / fft_length
    low, high = 1127 * np.log1p(np.array([spec.min_hz, spec.max_hz]) / 700)
    # In units of the distance between two centres: filter m rises from m to m + 1 and falls to m + 2.
    place = (1127 * np.log1p(hz / 700) - low) / (high - low) * (spec.num_mels + 1)
    centres = np.arange(1, spec.num_mels + 1)
    return np.maximum(0.0, 1 - np.abs(place[:, None] - centres)).astype(np.float32)


def _hann(spec: AudioSpec) -> np.ndarray:
    """(frame_length,) float32."""
    length = spec.frame_length + (spec.window == "periodic")
    return np.hanning(length)[: spec.frame_length].astype(np.float32)


# Frames transformed at a time, so that the work stays in a core's cache.
_FRAMES_AT_ONCE = 128


def log_mel(waveform: np.ndarray, spec: AudioSpec) -> np.ndarray:
    """(num_frames, num_mels) float32 of (samples,) float32: the log-mel spectrogram that ``spec`` describes.

    Frames start every hop_length samples, the first with the sound. With the preset "imp" log(mel + 1e-6) of magnitudes
    (the release's); with "audiomae" Kaldi's filter bank as torchaudio.compliance.kaldi.fbank computes it for AudioMAE,
    frame by frame: subtraction of the mean, pre-emphasis, window, power, filters, logarithm. AudioMAE subtracts the
    mean of the whole sound first, which subtracting each frame's mean makes unnecessary.

    The Slaney filters are librosa's; the transform is scipy's, because librosa's own costs every decode process tens of
    seconds of compilation at first use (equal: tests/pipeline/data/test_tokens.py). The bits are the same on any number
    of threads and with any SIMD: sums have a fixed order, and the rest is arithmetic that IEEE 754 rounds exactly.
    """
    waveform = waveform[: spec.num_samples]
    padded = np.zeros((spec.num_frames - 1) * spec.hop_length + spec.frame_length, np.float32)
    padded[: len(waveform)] = waveform[: len(padded)]
    frames = np.lib.stride_tricks.sliding_window_view(padded, spec.frame_length)[:: spec.hop_length]
    mel, window = np.empty((spec.num_frames, spec.num_mels), np.float32), _hann(spec)
    for start in range(0, spec.num_frames, _FRAMES_AT_ONCE):
        part = slice(start, start + _FRAMES_AT_ONCE)
        mel[part] = _log(_mel(_spectrum(frames[part], window, spec), spec), spec)
    if spec.pad_value is not None:
        whole = max(0, 1 + (len(waveform) - spec.frame_length) // spec.hop_length)
        mel[whole:] = spec.pad_value
    return mel


def _spectrum(frames: np.ndarray, window: np.ndarray, spec: AudioSpec) -> np.ndarray:
    """(frames, frequencies) float32 magnitudes or their squares."""
    if spec.remove_dc:
        frames = frames - frames.mean(axis=-1, keepdims=True)
    if spec.preemphasis:
        # The first sample of a frame is its own predecessor.
        before = np.concatenate([frames[:, :1], frames[:, :-1]], axis=-1)
        frames = frames - spec.preemphasis * before
    # numpy's abs of complex numbers differs between kinds of CPU in its last bit.
    parts = np.square(scipy.fft.rfft(frames * window, n=spec.fft_length, axis=-1).view(np.float32))
    power = parts[:, 0::2] + parts[:, 1::2]
    return power if spec.power == 2 else np.sqrt(power, out=power)


@functools.cache
def _sparse_filters(spec: AudioSpec) -> scipy.sparse.csr_array:
    """(num_mels, frequencies): no frequency is in more than two filters."""
    return scipy.sparse.csr_array(mel_filters(spec).T)


def _mel(spectrum: np.ndarray, spec: AudioSpec) -> np.ndarray:
    """``spectrum @ mel_filters(spec)``, each filter summed from its lowest frequency up; BLAS promises no order."""
    return (_sparse_filters(spec) @ spectrum.T).T


# Bits of the float64 sqrt(1/2), and the number of them that are the fraction.
_SQRT_HALF_BITS, _FRACTION_BITS = int(np.float64(math.sqrt(0.5)).view(np.int64)), 52


def _log(mel: np.ndarray, spec: AudioSpec) -> np.ndarray:
    """log(max(mel + log_offset, log_floor)) from exactly rounded operations alone; numpy's has several versions.

    With a number as 2^n m, m from sqrt(1/2) to sqrt(2), and s = (m - 1) / (m + 1), its logarithm is
    n log 2 + 2 (s + s^3 / 3 + s^5 / 5 + ...): in float64 to the eleventh power 10^-10 of the true value.
    """
    value = np.maximum(mel + np.float32(spec.log_offset), np.float32(spec.log_floor)).astype(np.float64, order="C")
    bits = value.view(np.int64)
    exponent = (bits - _SQRT_HALF_BITS) >> _FRACTION_BITS
    mantissa = (bits - (exponent << _FRACTION_BITS)).view(np.float64)
    s = (mantissa - 1) / (mantissa + 1)
    square = s * s
    series = square / 11
    for power in (9, 7, 5, 3):
        series += 1 / power
        series *= square
    series += 1
    series *= 2 * s
    return series + exponent * math.log(2)


def spectrogram_tokens(waveform: np.ndarray, spec: AudioSpec) -> np.ndarray:
    """(N, P) float32 patches of the normalised log-mel spectrogram, in (time, frequency) order."""
    mel = (log_mel(waveform, spec) - spec.mean) / spec.std
    time, frequency = spec.patch
    cut = mel.reshape(mel.shape[0] // time, time, mel.shape[1] // frequency, frequency)
    return np.ascontiguousarray(cut.transpose(0, 2, 1, 3).reshape(-1, time * frequency), np.float32)
