"""A sample's tokens from its decoded media: the ``tokens`` functions of ``modalities.MODALITIES``."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from pipeline.data import augment
from pipeline.data.modalities import Modality, load
from pipeline.data.spec import AudioSpec, Augment, ImageSpec, SoundAugment, TokenSpec, Variant, VideoSpec
from pipeline.data.tokens import choose_tokens, grid_positions, patchify, spectrogram_tokens
from pipeline.data.variants import view_frames, window_starts


@dataclasses.dataclass(frozen=True)
class View:
    """The part of a clip that a sample shows.

    rng: draws a training view; None for an evaluation view, then ``window`` (i, n) is the i-th of n windows evenly
    spaced in time.
    """

    variant: Variant
    window: tuple[int, int] = (0, 1)
    rng: np.random.Generator | None = None


@dataclasses.dataclass(frozen=True)
class TokenContext:
    """Inputs of a ``tokens`` function beside the decoded array and its settings.

    sizes: the model's patches and position tables. augment: the changes of a training view, None in evaluation.
    colours, sounds: generators for those changes, None without any. start_s: start of the frames beside a sound,
    None without frames. out: array to write vision tokens into; a new one is made if None.
    """

    view: View
    sizes: TokenSpec
    augment: Augment | None = None
    colours: np.random.Generator | None = None
    sounds: np.random.Generator | None = None
    start_s: float | None = None
    out: np.ndarray | None = None

    @classmethod
    def of(cls, view: View, sizes: TokenSpec, changes: Augment | None, out: np.ndarray | None) -> TokenContext:
        """The context at the start of a sample: ``colours`` and ``sounds`` branch off before anything is drawn."""
        colours = sounds = None
        if changes and changes.colour.probability:
            colours = augment.stream(view.rng, augment.COLOUR)
        if changes and changes.sound != SoundAugment():
            sounds = augment.stream(view.rng, augment.SOUND)
        return cls(view, sizes, changes, colours, sounds, out=out)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens of one modality of a sample. tokens: (N, P). positions: (N, axes) int32, rows of the position tables.

    start_s: start of the tokens within the clip, for modalities that follow them in time.
    """

    tokens: np.ndarray
    positions: np.ndarray
    start_s: float | None = None


def evaluation_tokens(
    array: np.ndarray, modality: Modality, settings: Any, view: View, sizes: TokenSpec
) -> dict[str, np.ndarray]:
    """{"tokens", "positions"} of one modality of a clip as evaluation and an exported model see it.

    view: one without a generator, so that nothing is drawn, changed or dropped.
    """
    made = load(modality.tokens)(array, settings, TokenContext(view, sizes))
    return {"tokens": made.tokens, "positions": made.positions}


def image_tokens(pixels: np.ndarray, spec: ImageSpec, context: TokenContext) -> Tokens:
    """Patches of a still image, (H, W, 3) uint8. spec: not used, so any modality decoded to such pixels can use it."""
    tokens, positions, _ = _vision(pixels[None], context)
    return Tokens(tokens, positions)


def video_tokens(frames: np.ndarray, spec: VideoSpec, context: TokenContext) -> Tokens:
    """Patches of several frames of (T, H, W, 3) uint8."""
    tokens, positions, first = _vision(frames, context)
    return Tokens(tokens, positions, start_s=first / spec.fps)


def _vision(frames: np.ndarray, context: TokenContext) -> tuple[np.ndarray, np.ndarray, int]:
    """(tokens, positions, the view's first frame)."""
    view, sizes = context.view, context.sizes
    shown, first = view_frames(frames, view.variant, augment=context.augment, rng=view.rng, window=view.window)
    if context.colours:
        shown = augment.jitter_colour(shown, context.augment.colour, context.colours)
    num_frames = sizes.vision_patch[0] if view.variant.num_frames else 1
    positions, keep = grid_positions(view.variant.grid, sizes.vision_positions), None
    if view.rng is not None and view.variant.drop_rate:
        keep = choose_tokens(len(positions), drop_rate=view.variant.drop_rate, rng=view.rng)
        positions = positions[keep]
    tokens = patchify(shown, (num_frames, *sizes.vision_patch[1:]), keep=keep, out=context.out)
    return tokens, positions, first


def sound_tokens(waveform: np.ndarray, spec: AudioSpec, context: TokenContext) -> Tokens:
    """Patches of the log-mel spectrogram of (samples,) float32."""
    sound = context.augment.sound if context.sounds else None
    start = _first_sample(len(waveform), spec, context, sound)
    part = waveform[start : start + spec.num_samples]
    if sound is not None:
        part = augment.change_waveform(part, sound, context.sounds)
    tokens = spectrogram_tokens(part, spec)
    if sound is not None:
        augment.mask_spectrogram(tokens, spec, sound, context.sounds)
    return Tokens(tokens, grid_positions(spec.grid, context.sizes.audio_positions))


def _first_sample(length: int, spec: AudioSpec, context: TokenContext, sound: SoundAugment | None) -> int:
    """First sample of the spectrogram: with the frames beside it, or of a window in time."""
    spare, (number, count) = max(0, length - spec.num_samples), context.view.window
    if context.start_s is not None:
        return int(context.start_s * spec.sample_rate_hz)
    if sound is not None:
        return augment.start_sample(spare, sound, context.sounds)
    # A single view of sound alone is its beginning.
    return 0 if count == 1 else window_starts(spare, count)[number]
