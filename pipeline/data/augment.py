"""Augmentations beside the crop: colours of frames, and the start, loudness and masks of a sound.

Every draw comes from a separate stream that branches off the sample's, so none changes the crop, prompt or tokens of
a sample. Pixels are computed in integers and sounds element by element, so the bits depend neither on
threads nor on the kind of CPU.
"""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from pipeline.data.spec import AudioSpec, Augment, ColourJitter, SoundAugment

COLOUR, SOUND = 1, 2

COLOUR_WORDS = re.compile(
    r"\b(colou?r\w*|red|reddish|orange|yellow|green|blue|purple|violet|pink|brown|beige|turquoise|magenta|cyan|black|white"
    r"|gr[ae]y|gold|golden|silver|dark|light|bright|pale|blonde?|skin tone)\b",
    re.IGNORECASE,
)
LOUDNESS_WORDS = re.compile(
    r"\b(loud|louder|loudly|quiet|quieter|quietly|soft|softly|silent|silence|faint|faintly|whisper\w*|noise|noisy"
    r"|distant|volume)\b",
    re.IGNORECASE,
)


def stream(rng: np.random.Generator, number: int) -> np.random.Generator:
    """The generator's number-th branch: drawing from it does not advance the generator."""
    return np.random.Generator(rng.bit_generator.jumped(number))


def for_words(augment: Augment, words: tuple[str, ...]) -> Augment:
    """The augmentations that keep a sample's words true: no other colours for a "red" car."""
    if augment.colour.probability and any(COLOUR_WORDS.search(w) for w in words):
        augment = dataclasses.replace(augment, colour=ColourJitter())
    sound = augment.sound
    if sound.changes_loudness and any(LOUDNESS_WORDS.search(w) for w in words):
        augment = dataclasses.replace(
            augment, sound=dataclasses.replace(sound, gain_db=(0.0, 0.0), noise_probability=0.0)
        )
    return augment


# --- colour ---

# Luma, the chroma that saturation scales, and the chroma turned by 90 degrees, of red, green and blue: the matrices of
# saturate and hueRotate (W3C Filter Effects, feColorMatrix).
_LUMA = (0.213, 0.715, 0.072)
_TURNED = ((-0.213, -0.715, 0.928), (0.143, 0.140, -0.283), (-0.787, 0.715, 0.072))
_BITS = 14


def jitter_colour(frames: np.ndarray, jitter: ColourJitter, rng: np.random.Generator) -> np.ndarray:
    """(T, H, W, 3) uint8 with changed colours, alike for all frames, or unchanged.

    As in the release: brightness, saturation, contrast about the clip's mean, hue, clipped to 0..255 at the end.
    """
    if rng.random() >= jitter.probability:
        return frames
    ranges = (jitter.brightness, jitter.saturation, jitter.contrast, jitter.hue)
    brightness, saturation, contrast, hue = (rng.uniform(-limit, limit) for limit in ranges)
    return change_colour(
        frames, brightness=brightness, saturation=1 + saturation, contrast=1 + contrast, turn=2 * math.pi * hue
    )


def change_colour(
    frames: np.ndarray, *, brightness: float, saturation: float, contrast: float, turn: float
) -> np.ndarray:
    """(..., 3) uint8. brightness: a share of 255 to add. turn: of the hue, in radians."""
    mix = _mixing(saturation, turn)
    mean = (frames.reshape(-1, 3).sum(0, dtype=np.int64) / (frames.size // 3)).tolist()
    planes = [frames[..., channel].astype(np.int32) for channel in range(3)]
    out = np.empty(frames.shape, np.uint8)
    for channel, weights in enumerate(mix):
        shift = (1 - contrast) * sum(w * m for w, m in zip(weights, mean, strict=True)) + 255 * brightness
        # Half a unit more rounds to the nearest.
        total = np.full(frames.shape[:-1], _fixed(shift + 0.5), np.int32)
        for weight, plane in zip(weights, planes, strict=True):
            total += _fixed(contrast * weight) * plane
        out[..., channel] = np.clip(total >> _BITS, 0, 255)
    return out


def _mixing(saturation: float, turn: float) -> list[list[float]]:
    """Each new channel's weights of red, green and blue."""
    along, across = saturation * math.cos(turn), saturation * math.sin(turn)
    return [
        [_LUMA[j] + along * ((i == j) - _LUMA[j]) + across * _TURNED[i][j] for j in range(3)]  # one row a channel
        for i in range(3)
    ]


def _fixed(value: float) -> np.int32:
    return np.int32(round(value * (1 << _BITS)))


# --- sound ---


def start_sample(spare: int, sound: SoundAugment, rng: np.random.Generator) -> int:
    """First sample of a spectrogram in a waveform that is ``spare`` samples longer."""
    return int(rng.integers(spare + 1)) if sound.random_start else 0


def change_waveform(waveform: np.ndarray, sound: SoundAugment, rng: np.random.Generator) -> np.ndarray:
    """(samples,) float32 with a random gain, and with noise at the given probability."""
    gain_db = rng.uniform(*sound.gain_db)
    noisy, snr_db = rng.random() < sound.noise_probability, rng.uniform(*sound.noise_snr_db)
    if gain_db:
        waveform = waveform * np.float32(10 ** (gain_db / 20))
    if noisy:
        level = np.float32(_rms(waveform) * 10 ** (-snr_db / 20))
        waveform = waveform + level * rng.standard_normal(len(waveform), np.float32)
    return waveform


def _rms(waveform: np.ndarray) -> float:
    # A sum of float32 would depend on its order; the one of integers does not.
    steps = np.rint(waveform * np.float32(1 << 15)).astype(np.int64)
    return math.sqrt(int((steps * steps).sum()) / max(1, len(steps))) / (1 << 15)


def mask_spectrogram(tokens: np.ndarray, audio: AudioSpec, sound: SoundAugment, rng: np.random.Generator) -> None:
    """Fills bands of frames and of mel bins of (N, P) tokens with the mean, in place (SpecAugment, Park et al. 2019).

    A band's width is uniform up to its share of the spectrogram; its position is uniform.
    """
    bands = [
        (axis, *_band(count, share, rng))
        for axis, (number, share, count) in enumerate(
            [
                (sound.time_masks, sound.time_mask_share, audio.num_frames),
                (sound.mel_masks, sound.mel_mask_share, audio.num_mels),
            ]
        )
        for _ in range(number)
    ]
    if not bands:
        return
    # Exact in any order of summation.
    mean = np.float32(math.fsum(tokens.ravel().tolist()) / tokens.size)
    (rows, columns), (time, mel) = audio.grid, audio.patch
    grid = tokens.reshape(rows, columns, time, mel)
    for axis, first, width in bands:
        patch, inside = np.divmod(np.arange(first, first + width), audio.patch[axis])
        grid[(patch, slice(None), inside) if axis == 0 else (slice(None), patch, slice(None), inside)] = mean


def _band(count: int, share: float, rng: np.random.Generator) -> tuple[int, int]:
    """(first, width) of a band of 0..count."""
    width = int(rng.integers(int(share * count) + 1))
    return int(rng.integers(count - width + 1)), width
