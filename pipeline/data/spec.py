"""What the data layer needs to know, as plain frozen dataclasses. ``pipeline/recipe`` makes them from YAML."""

from __future__ import annotations

import dataclasses
import itertools

# The encoder's embedder for each kind of media: a still image and a video share theirs.
MODEL_MODALITY = {"image": "vision", "video": "vision", "audio": "audio", "text": "text"}

# Schemes of URIs that any manifest may hold: places where data sets are kept. Others read other things (an archive in a
# file, memory, a repository), so the recipe must name them.
STORAGE_SCHEMES = ("file", "gcs", "gs", "hf", "http", "https", "s3")

# What a task's loss may be made of: terms that compare modalities, and terms that need a classifier.
CONTRASTIVE = ("nce", "sigmoid_pairs")
CLASSIFICATION = ("softmax", "sigmoid")
OBJECTIVES = (*CONTRASTIVE, *CLASSIFICATION)


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """Canonical image: RGB, short side resized to ``short_side`` pixels. decoder: see ``media.decoders``."""

    short_side: int = 256
    max_pixels: int = 100_000_000
    max_bytes: int = 256 << 20
    decoder: str = "pillow"


@dataclasses.dataclass(frozen=True)
class VideoSpec:
    """Canonical clip: RGB frames at ``fps``, short side resized, at most ``max_frames`` of them.

    The other caps are on the file: pixels of a frame, bytes, seconds, frames.
    """

    fps: float = 12.5
    short_side: int = 256
    max_frames: int = 16
    max_pixels: int = 4096 * 4096
    max_bytes: int = 8 << 30
    max_duration_s: float = 4 * 3600.0
    max_source_frames: int = 1_000_000
    decoder: str = "pyav"


@dataclasses.dataclass(frozen=True)
class AudioSpec:
    """Canonical waveform (mono, ``sample_rate_hz``) and its log-mel spectrogram of ``num_frames`` x ``num_mels``.

    The defaults are the release's: 128 frames of 128 mels, 16x16 patches, 64 tokens from 8.2 s. ``AUDIO_PRESETS`` has
    them by name, with AudioMAE's beside them.

    frame_length: samples under the window. fft_length: the frame is padded to it with zeros; None: frame_length.
    window: Hann, "periodic" (over N) or "symmetric" (over N - 1). remove_dc: each frame's mean is taken off.
    preemphasis: so much of the sample before is taken off each sample. power: 1 magnitudes, 2 their squares.
    mel_scale: "slaney", filters of equal area; "htk", filters of equal height (``tokens.mel_filters``).
    log_offset, log_floor: a value is log(max(mel + log_offset, log_floor)).
    pad_value: of frames that the sound does not fill whole; None: the sound goes on in silence.
    mean, std: of the log-mel values; tokens are (x - mean) / std.
    max_bytes, max_duration_s: caps on the file. decoder: see ``media.decoders``.

    Raises ValueError with the values where one is unknown or two contradict each other.
    """

    sample_rate_hz: int = 16_000
    frame_length: int = 2048
    hop_length: int = 1024
    num_frames: int = 128
    num_mels: int = 128
    min_hz: float = 80.0
    max_hz: float = 7600.0
    fft_length: int | None = None
    window: str = "periodic"
    remove_dc: bool = False
    preemphasis: float = 0.0
    power: int = 1
    mel_scale: str = "htk"
    log_offset: float = 1e-6
    log_floor: float = 0.0
    pad_value: float | None = None
    mean: float = 0.0
    std: float = 1.0
    patch: tuple[int, int] = (16, 16)
    max_bytes: int = 8 << 30
    max_duration_s: float = 4 * 3600.0
    decoder: str = "soundfile"

    def __post_init__(self):
        for name, known in (("window", ("periodic", "symmetric")), ("power", (1, 2)), ("mel_scale", ("slaney", "htk"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {known}, found {getattr(self, name)!r}")
        if self.fft_length is not None and self.fft_length < self.frame_length:
            raise ValueError(f"fft_length {self.fft_length} is shorter than frame_length {self.frame_length}")
        nyquist_hz = self.sample_rate_hz / 2
        if not self.min_hz < self.max_hz <= nyquist_hz:
            raise ValueError(
                f"expected min_hz < max_hz <= sample_rate_hz / 2; found {self.min_hz:g}, {self.max_hz:g} and "
                f"{nyquist_hz:g}"
            )
        if not self.log_offset and not self.log_floor:
            raise ValueError("log_offset and log_floor are both 0, and silence has no logarithm")

    @property
    def num_samples(self) -> int:
        """Samples that give exactly num_frames; the last ones run out in silence, or with a pad_value are whole."""
        last = self.hop_length if self.pad_value is None else self.frame_length
        return (self.num_frames - 1) * self.hop_length + last

    @property
    def grid(self) -> tuple[int, int]:
        return self.num_frames // self.patch[0], self.num_mels // self.patch[1]


# "imp": the release's. "audiomae": the front end that the paper names, 512 tokens from 10.24 s as AudioMAE's dataset.py
# makes them with torchaudio's Kaldi filter bank: 25 ms every 10 ms, mel bands from Kaldi's 20 Hz to half the rate,
# Kaldi's float32 epsilon below the logarithm, zeros after the end of a short sound, and (x - mean) / (2 std) with
# AudioSet's mean and std. 128 bands are more than 512 points resolve: the fourth holds no frequency and stays at the
# floor, there too.
AUDIO_PRESETS = {
    "imp": AudioSpec(),
    "audiomae": AudioSpec(
        frame_length=400,
        hop_length=160,
        num_frames=1024,
        min_hz=20.0,
        max_hz=8000.0,
        fft_length=512,
        window="symmetric",
        remove_dc=True,
        preemphasis=0.97,
        power=2,
        log_offset=0.0,
        log_floor=2.0**-23,
        pad_value=0.0,
        mean=-4.2677393,
        std=2 * 4.5689974,
    ),
}


@dataclasses.dataclass(frozen=True)
class DataSetSpec:
    """One manifest and how its media become canonical clips.

    shards: a folder of preprocessed shards to read instead of the media. classes: ordered; () where there are none.
    schemes: of media URIs beside ``STORAGE_SCHEMES`` and those of its manifests.
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
    schemes: tuple[str, ...] = ()

    @property
    def allowed_schemes(self) -> tuple[str, ...]:
        """Schemes that URIs of its media may have."""
        manifests = (uri.partition("://") for uri in (self.manifest, *self.held_out.values()))
        return tuple(sorted({*STORAGE_SCHEMES, *self.schemes, *(scheme for scheme, is_uri, _ in manifests if is_uri)}))


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
class ColourJitter:
    """Other colours with this probability, the same for all frames of a clip; the amounts are the release's.

    brightness: share of full white that is added or taken off. contrast, saturation: their factors differ from 1 by at
    most this. hue: turned by at most this part of the circle, either way.
    """

    probability: float = 0.0
    brightness: float = 0.125
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.2


@dataclasses.dataclass(frozen=True)
class SoundAugment:
    """random_start: a sound that is longer than the spectrogram starts anywhere, unless frames beside it fix its start.

    gain_db: louder by a number of decibels in this range. noise_probability, noise_snr_db: white noise is mixed in, so
    many decibels below the sound. time_masks, mel_masks: bands of frames and of mel bins that are filled with the mean,
    each at most time_mask_share or mel_mask_share of the spectrogram wide.
    """

    random_start: bool = False
    gain_db: tuple[float, float] = (0.0, 0.0)
    noise_probability: float = 0.0
    noise_snr_db: tuple[float, float] = (10.0, 30.0)
    time_masks: int = 0
    time_mask_share: float = 0.2
    mel_masks: int = 0
    mel_mask_share: float = 0.3

    @property
    def changes_loudness(self) -> bool:
        return self.gain_db != (0.0, 0.0) or self.noise_probability > 0


@dataclasses.dataclass(frozen=True)
class Augment:
    """What training changes of a sample, evaluation never.

    area, aspect: of the crop, uniform in these ranges. flip: mirrored half the time. colour and sound leave a sample
    alone whose words tell what they would change (``augment.for_words``).
    """

    area: tuple[float, float] = (1.0, 1.0)
    aspect: tuple[float, float] = (1.0, 1.0)
    flip: bool = False
    colour: ColourJitter = ColourJitter()
    sound: SoundAugment = SoundAugment()


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """One (data set, objective) pair.

    objectives: (name, weight) of each term of the loss. A classifier looks at the first modality that is not text.
    text: "captions" draws one of the row's texts, "labels" fills a prompt with the row's label.
    positives: rows with equal "labels" or "text" are positives of each other; "instance": no two rows are.
    text_length: tokens; longer texts are cut. max_characters: longer texts are left out, as are those that are no text.
    classes: the part of the data set's classes that counts, all by default.
    pair_weights: (pair of model modalities such as "audio_text", weight) where it is not 1; 0 leaves the pair out.
    microbatches: the number of parts that a batch is worked through in for one update.
    """

    name: str
    data_set: str
    objectives: tuple[tuple[str, float], ...]
    modalities: tuple[str, ...]
    variants: tuple[Variant, ...]
    weight: float | None = None
    classes: tuple[str, ...] = ()
    text: str = "captions"
    text_length: int = 64
    max_characters: int = 100_000
    positives: str = "text"
    augment: Augment = Augment()
    pair_weights: tuple[tuple[str, float], ...] = ()
    microbatches: int = 1

    @property
    def contrasts(self) -> bool:
        """Whether a term of the loss compares modalities."""
        return any(name in CONTRASTIVE for name, _ in self.objectives)

    @property
    def classifies(self) -> bool:
        """Whether a term of the loss needs a classifier."""
        return any(name in CLASSIFICATION for name, _ in self.objectives)

    @property
    def classified(self) -> str | None:
        """The modality that the classifier looks at."""
        return self.media[0] if self.classifies else None

    @property
    def pairs(self) -> tuple[str, ...]:
        """The pairs that a contrastive term compares, named as in ``pair_weights`` whatever their weight."""
        names = sorted(MODEL_MODALITY[m] for m in self.modalities)
        return tuple("_".join(pair) for pair in itertools.combinations(names, 2)) if self.contrasts else ()

    @property
    def media(self) -> tuple[str, ...]:
        """The modalities that are not text."""
        return tuple(m for m in self.modalities if m != "text")


@dataclasses.dataclass(frozen=True)
class TokenSpec:
    """What turns a clip into tokens, the same for all tasks: patch and position tables of the model."""

    vision_patch: tuple[int, int, int] = (4, 16, 16)
    vision_positions: tuple[int, int, int] = (16, 32, 32)
    audio_positions: tuple[int, int] = (64, 8)


@dataclasses.dataclass(frozen=True)
class DecodeLimits:
    """What decoding one sample may take. recycle_bytes: growth after which a process makes place for a fresh one."""

    timeout_s: float = 60.0
    memory_bytes: int = 4 << 30
    recycle_bytes: int = 1 << 30
