"""What the data layer needs to know, as plain frozen dataclasses. ``pipeline/recipe`` makes them from YAML."""

from __future__ import annotations

import dataclasses

# The encoder's embedder for each kind of media: a still image and a video share theirs.
MODEL_MODALITY = {"image": "vision", "video": "vision", "audio": "audio", "text": "text"}


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """Canonical image: RGB, short side resized to ``short_side`` pixels."""

    short_side: int = 256
    max_pixels: int = 100_000_000


@dataclasses.dataclass(frozen=True)
class VideoSpec:
    """Canonical clip: RGB frames at ``fps``, short side resized, at most ``max_frames`` of them."""

    fps: float = 12.5
    short_side: int = 256
    max_frames: int = 16


@dataclasses.dataclass(frozen=True)
class AudioSpec:
    """Canonical waveform (mono, ``sample_rate_hz``) and its log-mel spectrogram of ``num_frames`` x ``num_mels``.

    The defaults are the release's: 128 frames of 128 mels, 16x16 patches, 64 tokens from 8.2 s.
    mean, std: of the log-mel values; tokens are (x - mean) / std.
    """

    sample_rate_hz: int = 16_000
    frame_length: int = 2048
    hop_length: int = 1024
    num_frames: int = 128
    num_mels: int = 128
    min_hz: float = 80.0
    max_hz: float = 7600.0
    mean: float = 0.0
    std: float = 1.0
    patch: tuple[int, int] = (16, 16)

    @property
    def num_samples(self) -> int:
        """Samples that give exactly num_frames, the last frames padded at the end with zeros."""
        return self.num_frames * self.hop_length

    @property
    def grid(self) -> tuple[int, int]:
        return self.num_frames // self.patch[0], self.num_mels // self.patch[1]


@dataclasses.dataclass(frozen=True)
class DataSetSpec:
    """One manifest and how its media become canonical clips.

    shards: a folder of preprocessed shards to read instead of the media. classes: ordered; () where there are none.
    """

    name: str
    manifest: str
    held_out: dict[str, str]
    shards: str | None = None
    classes: tuple[str, ...] = ()
    image: ImageSpec = ImageSpec()
    video: VideoSpec = VideoSpec()
    audio: AudioSpec = AudioSpec()
    max_reject_fraction: float = 0.05


@dataclasses.dataclass(frozen=True)
class Variant:
    """One input size of a task. vision tokens of a step = global_batch_size x num_vision_tokens."""

    name: str
    global_batch_size: int
    num_frames: int = 0
    size: int = 0
    drop_rate: float = 0.0
    grid: tuple[int, int, int] = (0, 0, 0)
    num_vision_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Augment:
    """Training crops: area and aspect ratio of the crop, uniform in these ranges; a horizontal flip half the time."""

    area: tuple[float, float] = (1.0, 1.0)
    aspect: tuple[float, float] = (1.0, 1.0)
    flip: bool = False


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """One (data set, objective) pair.

    text: "captions" draws one of the row's texts, "labels" fills a prompt with the row's label.
    positives: rows with equal "labels" or "text" are positives of each other; "instance": no two rows are.
    classes: the part of the data set's classes that counts, all by default.
    """

    name: str
    data_set: str
    objective: str
    modalities: tuple[str, ...]
    variants: tuple[Variant, ...]
    weight: float | None = None
    classes: tuple[str, ...] = ()
    text: str = "captions"
    text_length: int = 64
    positives: str = "text"
    augment: Augment = Augment()


@dataclasses.dataclass(frozen=True)
class TokenSpec:
    """What turns a clip into tokens, the same for all tasks: patch and position tables of the model."""

    vision_patch: tuple[int, int, int] = (4, 16, 16)
    vision_positions: tuple[int, int, int] = (16, 32, 32)
    audio_positions: tuple[int, int] = (64, 8)
