"""The sound of a moving digit: a small arpeggio whose pitches say which digit it is.

Digits are three semitones apart and each has its own figure of four notes, so that their log-mel spectrograms differ
between 150 and 4000 Hz. Tuning, rhythm, loudness, phase, the note it begins with and a light noise differ by file.
"""

from __future__ import annotations

import numpy as np

SAMPLE_RATE_HZ = 16_000
_LOWEST_PITCH_HZ = 165.0
_HIGHEST_PARTIAL_HZ = 4000.0
_SEMITONES_BETWEEN_DIGITS = 3
_NUM_PARTIALS = 5
# Semitones above the digit's own pitch.
_FIGURES = (
    (0, 4, 7, 12),
    (0, 7, 0, 7),
    (0, 3, 7, 3),
    (0, 12, 0, 12),
    (0, 5, 9, 5),
    (0, 2, 4, 7),
    (0, 0, 7, 7),
    (0, 9, 5, 2),
    (0, 12, 7, 4),
    (0, 3, 6, 9),
)


def _notes(digit: int, rng: np.random.Generator, *, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """The pitch in Hz and the time since the start of its note in seconds, both (num_samples,)."""
    detune_semitones = rng.uniform(-0.2, 0.2)
    figure = np.roll(_FIGURES[digit], rng.integers(4))
    usual_note_s = rng.uniform(0.16, 0.28)
    num_notes = int(num_samples / SAMPLE_RATE_HZ / (0.85 * usual_note_s)) + 1
    lengths = np.rint(usual_note_s * rng.uniform(0.85, 1.15, num_notes) * SAMPLE_RATE_HZ).astype(int)
    semitones = _SEMITONES_BETWEEN_DIGITS * digit + detune_semitones + np.resize(figure, num_notes)
    pitch_hz = np.repeat(_LOWEST_PITCH_HZ * 2 ** (semitones / 12), lengths)[:num_samples]
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)[:num_samples]
    return pitch_hz, (np.arange(num_samples) - starts) / SAMPLE_RATE_HZ


def tone(digit: int, rng: np.random.Generator, *, num_samples: int) -> np.ndarray:
    """The waveform of a digit, (num_samples,) float32 in -1..1."""
    pitch_hz, since_note_s = _notes(digit, rng, num_samples=num_samples)
    # Reduced to one turn before the cast to float32, whose sine is several times faster.
    phase = (2 * np.pi * (np.cumsum(pitch_hz / SAMPLE_RATE_HZ) % 1)).astype(np.float32)
    wave = np.zeros(num_samples, np.float32)
    for partial in range(1, _NUM_PARTIALS + 1):
        strength = np.float32(partial**-1.2) * (partial * pitch_hz < _HIGHEST_PARTIAL_HZ)
        wave += strength * np.sin(partial * phase + np.float32(rng.uniform(0, 2 * np.pi)))
    # The attack takes 10 ms: a note that starts abruptly clicks, and a click looks the same for every digit.
    envelope = np.minimum(since_note_s / 0.01, 1) * np.exp(-since_note_s / 0.15)
    loudness = 10 ** (rng.uniform(-16, -6) / 20)
    noise = 10 ** (rng.uniform(-56, -46) / 20) * rng.standard_normal(num_samples, np.float32)
    return np.clip(loudness * envelope * wave / 2 + noise, -1, 1).astype(np.float32)
