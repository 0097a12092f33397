"""The inputs of the data layer as plain frozen dataclasses. ``pipeline/recipe`` makes them from YAML."""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, Any, Literal

from pipeline.data.modalities import EMBEDDERS, MEDIA, MODALITIES, TEXT, Embedder, Modality, load
from pipeline.data.row_index import RowIndex
from pipeline.keys import Interval, key

# Schemes of URIs that any manifest may hold: places where data sets are kept. Others read other things (an archive in a
# file, memory, a repository), so the recipe must name them.
STORAGE_SCHEMES = ("file", "gcs", "gs", "hf", "http", "https", "s3")


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """Decoding of images: RGB, at one size of the shorter side."""

    short_side: int = key(256, "Pixels of an image's shorter side after decoding; variants are cut out of it.", ge=16)
    max_pixels: int = key(100_000_000, "Maximum pixels of an image; larger ones are rejected.", ge=1)
    max_bytes: int = key(256 << 20, "Maximum bytes of an image file; larger ones are rejected unread.", ge=1)
    decoder: str = key("pillow", 'Decoder of images: "pillow", or one of your own as package.module:function.')


@dataclasses.dataclass(frozen=True)
class VideoSpec:
    """Decoding of videos: RGB frames at one rate and one size of the shorter side."""

    fps: float = key(12.5, "Frames per second of a decoded clip, whatever the file's rate.", gt=0)
    short_side: int = key(256, "Pixels of a frame's shorter side after decoding; variants are cut out of it.", ge=16)
    max_frames: int = key(16, "Maximum frames of a decoded clip; variants and evaluation see no others.", ge=1)
    max_pixels: int = key(4096 * 4096, "Maximum pixels of a video frame; larger ones are rejected.", ge=1)
    max_bytes: int = key(8 << 30, "Maximum bytes of a video file; larger ones are rejected unread.", ge=1)
    max_duration_s: float = key(4 * 3600.0, "Maximum seconds of a video; longer ones are rejected.", gt=0)
    max_source_frames: int = key(1_000_000, "Maximum frames of a video file; longer ones are rejected.", ge=1)
    decoder: str = key("pyav", 'Decoder of videos: "pyav", "decord", or your own as package.module:function.')


@dataclasses.dataclass(frozen=True)
class AudioSettings:
    """Decoding of sound, and the log-mel spectrogram that the model sees of it.

    The defaults are the release's: 128 frames of 128 mels from 8.2 s. ``AUDIO_PRESETS`` has them by name, with
    AudioMAE's beside them. Raises ValueError with the values if one is unknown or two contradict each other.
    """

    preset: Literal["imp", "audiomae"] = key(
        "imp",
        'Front end that gives the values of keys left out: "imp" is the release\'s (64 tokens from 8.2 s), '
        '"audiomae" AudioMAE\'s (512 tokens from 10.24 s).',
    )
    sample_rate_hz: int = key(16_000, "Samples per second of the decoded waveform, which is mono.", ge=1000)
    frame_length: int = key(2048, "Samples under the window of a spectrogram frame.", ge=16)
    hop_length: int = key(1024, "Samples from the start of a spectrogram frame to the next.", ge=1)
    num_frames: int = key(128, "Frames of a spectrogram; a multiple of the model's patch.", ge=16)
    num_mels: int = key(128, "Mel bands of a spectrogram; a multiple of the model's patch.", ge=16)
    min_hz: float = key(80.0, "Frequency at which the lowest mel band starts.", ge=0)
    max_hz: float = key(7600.0, "Frequency at which the highest mel band ends, at most half the sample rate.", gt=0)
    fft_length: int | None = key(
        None, "Samples of the Fourier transform, the frame padded with zeros; null: frame_length.", ge=16
    )
    window: Literal["periodic", "symmetric"] = key(
        "periodic", "Form of the Hann window: over frame_length samples, or over one fewer."
    )
    remove_dc: bool = key(False, "Each spectrogram frame's mean is subtracted from it.")
    preemphasis: float = key(0.0, "Share of the sample before that is subtracted from each sample.", ge=0, le=1)
    power: Literal[1, 2] = key(1, "1: magnitudes of the transform; 2: their squares.")
    mel_scale: Literal["slaney", "htk"] = key("htk", "Mel filters of equal area (slaney) or of equal height (htk).")
    log_offset: float = key(1e-6, "Added to a mel value before its logarithm.", ge=0)
    log_floor: float = key(0.0, "Smallest value of which the logarithm is taken.", ge=0)
    pad_value: float | None = key(
        None, "Log-mel value of frames beyond the end of the sound; null: the sound is padded with silence."
    )
    mean: float = key(0.0, "Mean of the data's log-mel values; subtracted before the model sees them.")
    std: float = key(1.0, "Standard deviation of the data's log-mel values; the model sees values divided by it.", gt=0)
    max_bytes: int = key(8 << 30, "Maximum bytes of an audio file; larger ones are rejected unread.", ge=1)
    max_duration_s: float = key(4 * 3600.0, "Maximum seconds of a sound; longer ones are rejected.", gt=0)
    decoder: str = key("soundfile", 'Decoder of sound: "soundfile", "pyav", or your own as package.module:function.')

    def __post_init__(self) -> None:
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


@dataclasses.dataclass(frozen=True)
class AudioSpec(AudioSettings):
    """Sound as the model sees it. patch: frames and mel bands of a token, the model's."""

    patch: tuple[int, int] = (16, 16)

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
        preset="audiomae",
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
class AddedModality:
    """A modality that the recipe adds, with its settings for one data set."""

    name: str
    modality: Modality
    settings: Any


@dataclasses.dataclass(frozen=True)
class DataSetSpec:
    """One manifest and how its media become canonical clips.

    shards: a folder of preprocessed shards to read instead of the media. classes: ordered; () without any.
    schemes: of media URIs beside ``STORAGE_SCHEMES`` and those of its manifests. added: modalities beside image, video
    and audio, sorted by name. index: of the manifest's rows, once a run knows them.
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
    added: tuple[AddedModality, ...] = ()
    index: RowIndex | None = dataclasses.field(default=None, compare=False)

    def modality(self, name: str) -> Modality:
        """The modality with this name, built in or added."""
        return MODALITIES[name] if name in MODALITIES else self._added(name).modality

    def settings(self, name: str) -> Any:
        """The settings of the modality with this name: ``image``, ``video``, ``audio`` or an added one's."""
        return getattr(self, name) if name in MODALITIES else self._added(name).settings

    def _added(self, name: str) -> AddedModality:
        return next(added for added in self.added if added.name == name)

    @property
    def media(self) -> tuple[str, ...]:
        """All modalities that come from files."""
        return (*MEDIA, *(added.name for added in self.added))

    @property
    def media_columns(self) -> tuple[str, ...]:
        """The manifest columns of added modalities."""
        columns = (column for added in self.added for column in added.modality.columns_of(added.name))
        return tuple(dict.fromkeys(column for column in columns if column not in MEDIA))

    @property
    def own_patches(self) -> dict[str, tuple[int, Embedder]]:
        """Modality → (tokens of a sample, its embedder), of added modalities with their own layers."""
        own = ((a, a.modality.embedder) for a in self.added if isinstance(a.modality.embedder, Embedder))
        return {a.name: (load(embedder.num_tokens)(a.settings), embedder) for a, embedder in own}

    @property
    def clip_s(self) -> float:
        """Seconds of a canonical video clip."""
        return self.video.max_frames / self.video.fps

    @functools.cached_property
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
    """Colour jitter of images and frames, off unless it has a probability (the release's is 0.8)."""

    probability: float = key(0.0, "Share of samples whose colours change, all frames of a clip alike.", ge=0, le=1)
    brightness: float = key(0.125, "Maximum share of full white that is added or subtracted.", ge=0, le=1)
    contrast: float = key(0.4, "Maximum by which the factor on contrast differs from 1.", ge=0, le=1)
    saturation: float = key(0.4, "Maximum by which the factor on saturation differs from 1.", ge=0, le=1)
    hue: float = key(0.2, "Maximum part of the circle by which hues turn, either way.", ge=0, le=0.5)


_Decibels = Annotated[float, Interval(ge=-120, le=120)]


@dataclasses.dataclass(frozen=True)
class SoundAugment:
    """Changes of sounds in training, none by default."""

    random_start: bool = key(
        False, "A sound longer than the spectrogram starts anywhere, unless frames beside it fix its start."
    )
    gain_db: tuple[_Decibels, _Decibels] = key((0.0, 0.0), "Range of the decibels by which a sound is made louder.")
    noise_probability: float = key(0.0, "Share of sounds that white noise is mixed into.", ge=0, le=1)
    noise_snr_db: tuple[_Decibels, _Decibels] = key(
        (10.0, 30.0), "Range of the decibels by which noise is below the sound."
    )
    time_masks: int = key(0, "Bands of spectrogram frames that are replaced by the mean (SpecAugment).", ge=0)
    time_mask_share: float = key(0.2, "Maximum width of a band of frames, as a share of all frames.", ge=0, le=1)
    mel_masks: int = key(0, "Bands of mel bins that are replaced by the mean (SpecAugment).", ge=0)
    mel_mask_share: float = key(0.3, "Maximum width of a band of mel bins, as a share of all bins.", ge=0, le=1)

    @property
    def changes_loudness(self) -> bool:
        return self.gain_db != (0.0, 0.0) or self.noise_probability > 0


@dataclasses.dataclass(frozen=True)
class Augment:
    """Changes of samples in training; evaluation makes none.

    Colours and sounds stay as they are if the sample's words tell what would change (``augment.for_words``).
    """

    area: tuple[float, float] = key((1.0, 1.0), "Range of a random crop's share of the area; [1, 1] crops nothing.")
    aspect: tuple[float, float] = key((1.0, 1.0), "Range of a random crop's width over its height.")
    flip: bool = key(False, "Half of all images and clips are mirrored, left to right.")
    colour: ColourJitter = ColourJitter()
    sound: SoundAugment = SoundAugment()


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """One (data set, objective) pair.

    objectives: (name, weight) of each term of the loss.
    text: "captions" draws one of the row's texts, "labels" fills a prompt with the row's label.
    positives: rows with equal "labels" or "text" are positives of each other; "instance": no two rows are.
    text_length: tokens; longer texts are cut. max_characters: longer texts are left out, as are those that are no text.
    classes: the part of the data set's classes that counts, all by default.
    pairs: pairs of model modalities such as "audio_text" that a term of the loss compares; () if none compares any.
    pair_weights: (pair, weight) where it is not 1; 0 leaves the pair out.
    classified: the modality that a classifier looks at; None if no term of the loss needs one.
    microbatches: the number of parts that a batch is worked through in for one update.
    embedders: (modality, the model's name for its layers) of modalities that the recipe adds.
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
    pairs: tuple[str, ...] = ()
    pair_weights: tuple[tuple[str, float], ...] = ()
    classified: str | None = None
    microbatches: int = 1
    embedders: tuple[tuple[str, str], ...] = ()

    def embedder(self, modality: str) -> str:
        """The model's name for the layers of a modality."""
        return EMBEDDERS.get(modality) or dict(self.embedders)[modality]

    @property
    def contrasts(self) -> bool:
        """Whether a term of the loss compares modalities."""
        return bool(self.pairs)

    @property
    def classifies(self) -> bool:
        """Whether a term of the loss needs a classifier."""
        return self.classified is not None

    @property
    def media(self) -> tuple[str, ...]:
        """The modalities that are not text."""
        return tuple(m for m in self.modalities if m != TEXT)


@dataclasses.dataclass(frozen=True)
class TokenSpec:
    """The model's patches and position tables, by which all tasks cut clips into tokens."""

    vision_patch: tuple[int, int, int] = (4, 16, 16)
    vision_positions: tuple[int, int, int] = (16, 32, 32)
    audio_positions: tuple[int, int] = (64, 8)


@dataclasses.dataclass(frozen=True)
class DecodeLimits:
    """Limits on decoding one sample. recycle_bytes: growth after which a process is replaced by a fresh one.

    storage_s: in which its file must come from storage.
    """

    timeout_s: float = 60.0
    storage_s: float = 225.0
    memory_bytes: int = 4 << 30
    recycle_bytes: int = 1 << 30
