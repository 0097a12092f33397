"""Every setting of a recipe with its default, and the plain dataclasses that come of them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import pydantic_core

from model.config import ModelConfig, from_variant
from model.step import OptimizerConfig
from pipeline.data import spec
from pipeline.data.media.process import DecodeLimits
from pipeline.data.variants import make_variant
from pipeline.errors import RequestError
from pipeline.train.sampler import KINDS, SamplerSpec, Stage

# Frames of a video variant that names none.
_FRAMES = 16


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class MoESettings(_Strict):
    """The experts of a -moe variant; null leaves what the variant says. ``model.config.MoEConfig`` has the details.

    placement: sparse layers are the "last" ones, or "interleaved" with dense ones. router: "experts_choose", the
    paper's, or "tokens_choose": a token takes its num_selected best experts while they have room, tokens in the order
    of the batch or, with batch_priority, of their best probability. capacity_factor: slots of all experts over tokens.
    load_balance_weight, z_loss_weight: of the losses that some routers need, 0 by default. group: what competes for
    the experts, the tokens of one "sample" or up to group_size "tokens" of neighbouring samples. route_padding:
    padding competes too. dispatch: how tokens reach their experts; it changes nothing but the speed.
    """

    num_experts: int | None = pydantic.Field(None, ge=1)
    num_layers: int | None = pydantic.Field(None, ge=1)
    capacity_factor: float | None = pydantic.Field(None, gt=0)
    placement: Literal["last", "interleaved"] | None = None
    router: Literal["experts_choose", "tokens_choose"] | None = None
    num_selected: int | None = pydantic.Field(None, ge=1)
    batch_priority: bool | None = None
    load_balance_weight: float | None = pydantic.Field(None, ge=0)
    z_loss_weight: float | None = pydantic.Field(None, ge=0)
    group: Literal["sample", "tokens"] | None = None
    group_size: int | None = pydantic.Field(None, ge=1)
    route_padding: bool | None = None
    dispatch: Literal["auto", "index", "einsum"] | None = None


class ModelSettings(_Strict):
    """The model: a variant, and what replaces its fields; null leaves what the variant says.

    variant: a name of model/config.py; the rest: fields of ``model.config.ModelConfig``. temperature_init: null follows
    the largest batch of a task that compares modalities (``recipe.defaults``).

    towers: one "shared" encoder, or one "per_modality". attention: "xla" or the fused kernel "cudnn"; "auto" takes the
    fused one where it can. remat: what the backward pass computes again to save memory, from "full" (whole layers) over
    "attention", "dots" and "products" to "none"; "auto" is "attention", and on GPUs what their memory allows. scan:
    layers are one compiled body that runs depth times; false unrolls it. unroll_on_gpu: on GPUs it is unrolled, the
    faster way there.
    contrastive_chunk: columns that a contrastive loss compares at a time. text_embedding_std: standard deviation of
    the table of text tokens at the start.
    """

    variant: str = "imp-tiny-moe"
    moe: MoESettings = MoESettings()
    common_dim: int | None = pydantic.Field(None, ge=1)
    temperature_init: float | None = pydantic.Field(None, gt=0)
    temperature_floor: float | None = pydantic.Field(None, gt=0)
    position_scale: float | None = pydantic.Field(None, gt=0)
    towers: Literal["shared", "per_modality"] | None = None
    attention: Literal["auto", "xla", "cudnn"] | None = None
    remat: Literal["auto", "full", "attention", "dots", "products", "none"] | None = None
    scan: bool | None = None
    unroll_on_gpu: bool | None = None
    contrastive_chunk: int | None = pydantic.Field(None, ge=1)
    text_embedding_std: float = pydantic.Field(1.0, gt=0)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


class TextSettings(_Strict):
    """How texts become tokens.

    tokenizer: a sentencepiece model or a Hugging Face tokenizer.json; null trains one of vocab_size pieces on the
    data sets' own text. max_characters: longer texts of a row are left out; tasks cut the others at text_length tokens.
    """

    tokenizer: str | None = None
    vocab_size: int = pydantic.Field(1000, ge=16)
    max_characters: int = pydantic.Field(100_000, ge=1, le=1_000_000)


class ImageSettings(_Strict):
    """decoder: "pillow", or one of your own as package.module:function (``media/decoders.py`` says what it is)."""

    short_side: int = pydantic.Field(256, ge=16)
    max_pixels: int = pydantic.Field(100_000_000, ge=1)
    max_bytes: int = pydantic.Field(256 << 20, ge=1)
    decoder: str = "pillow"


class VideoSettings(_Strict):
    """max_pixels (of a frame), max_bytes, max_duration_s, max_source_frames: files beyond these are rejects.

    decoder: "pyav", "decord", or one of your own as package.module:function.
    """

    fps: float = pydantic.Field(12.5, gt=0)
    short_side: int = pydantic.Field(256, ge=16)
    max_frames: int = pydantic.Field(16, ge=1)
    max_pixels: int = pydantic.Field(4096 * 4096, ge=1)
    max_bytes: int = pydantic.Field(8 << 30, ge=1)
    max_duration_s: float = pydantic.Field(4 * 3600.0, gt=0)
    max_source_frames: int = pydantic.Field(1_000_000, ge=1)
    decoder: str = "pyav"


class AudioSettings(_Strict):
    """preset: the front end that the other settings start from, each of which replaces its own (``spec.AudioSpec``).

    "imp" is the release's, 64 tokens from 8.2 s; "audiomae" AudioMAE's, 512 tokens from 10.24 s. The resolved recipe
    holds the preset's name and all its values, and loads to the same again. max_bytes, max_duration_s: files beyond
    these are rejects. decoder: "soundfile", "pyav", or one of your own as package.module:function.
    """

    preset: Literal["imp", "audiomae"] = "imp"
    sample_rate_hz: int = pydantic.Field(16_000, ge=1000)
    frame_length: int = pydantic.Field(2048, ge=16)
    hop_length: int = pydantic.Field(1024, ge=1)
    num_frames: int = pydantic.Field(128, ge=16)
    num_mels: int = pydantic.Field(128, ge=16)
    min_hz: float = pydantic.Field(80.0, ge=0)
    max_hz: float = pydantic.Field(7600.0, gt=0)
    fft_length: int | None = pydantic.Field(None, ge=16)
    window: Literal["periodic", "symmetric"] = "periodic"
    remove_dc: bool = False
    preemphasis: float = pydantic.Field(0.0, ge=0, le=1)
    power: Literal[1, 2] = 1
    mel_scale: Literal["slaney", "htk"] = "htk"
    log_offset: float = pydantic.Field(1e-6, ge=0)
    log_floor: float = pydantic.Field(0.0, ge=0)
    pad_value: float | None = None
    mean: float = 0.0
    std: float = pydantic.Field(1.0, gt=0)
    max_bytes: int = pydantic.Field(8 << 30, ge=1)
    max_duration_s: float = pydantic.Field(4 * 3600.0, gt=0)
    decoder: str = "soundfile"

    @pydantic.model_validator(mode="before")
    @classmethod
    def _from_preset(cls, given):
        """What is not given comes from the preset; what is no preset is left for the field's own check."""
        if not isinstance(given, dict) or given.get("preset") not in list(spec.AUDIO_PRESETS):
            return given
        values = dataclasses.asdict(spec.AUDIO_PRESETS[given["preset"]])
        return {name: value for name, value in values.items() if name in cls.model_fields} | given


class DataSetSettings(_Strict):
    """The data sets by name: their manifests, and how their media are decoded where a task or a measurement needs them.

    held_out: one manifest, or several by name. classes: a list, or a file with one class a line. schemes: of media URIs
    in the manifest, beside file, gs, hf, http, https, s3 and the manifest's own; rows with others are rejects.
    """

    manifest: str
    held_out: str | dict[str, str] = {}
    shards: str | None = None
    classes: list[str] | str = []
    image: ImageSettings = ImageSettings()
    video: VideoSettings = VideoSettings()
    audio: AudioSettings = AudioSettings()
    max_reject_fraction: float | None = pydantic.Field(None, ge=0, le=1)
    schemes: list[Annotated[str, pydantic.Field(pattern=r"^[A-Za-z][A-Za-z0-9+.-]*$")]] = []


class VariantSettings(_Strict):
    """One input size of a task; its batch follows from the first variant's vision tokens, up to 5 % below them.

    frames: of videos.
    """

    size: int = pydantic.Field(ge=1)
    frames: int | None = pydantic.Field(None, ge=1)
    drop_rate: float = pydantic.Field(0.0, ge=0, lt=1)

    @property
    def num_frames(self) -> int:
        return self.frames or _FRAMES


class ColourSettings(_Strict):
    """Colour jitter, off unless it has a probability (the release's is 0.8): see ``data.spec.ColourJitter``."""

    probability: float = pydantic.Field(0.0, ge=0, le=1)
    brightness: float = pydantic.Field(0.125, ge=0, le=1)
    contrast: float = pydantic.Field(0.4, ge=0, le=1)
    saturation: float = pydantic.Field(0.4, ge=0, le=1)
    hue: float = pydantic.Field(0.2, ge=0, le=0.5)


_Decibels = Annotated[float, pydantic.Field(ge=-120, le=120)]


class SoundSettings(_Strict):
    """What training changes of sounds, nothing by default: see ``data.spec.SoundAugment``."""

    random_start: bool = False
    gain_db: tuple[_Decibels, _Decibels] = pydantic.Field((0.0, 0.0), strict=False)
    noise_probability: float = pydantic.Field(0.0, ge=0, le=1)
    noise_snr_db: tuple[_Decibels, _Decibels] = pydantic.Field((10.0, 30.0), strict=False)
    time_masks: int = pydantic.Field(0, ge=0)
    time_mask_share: float = pydantic.Field(0.2, ge=0, le=1)
    mel_masks: int = pydantic.Field(0, ge=0)
    mel_mask_share: float = pydantic.Field(0.3, ge=0, le=1)


class AugmentSettings(_Strict):
    """What training changes of a sample, evaluation never: see ``data.spec.Augment``."""

    area: tuple[float, float] = pydantic.Field((1.0, 1.0), strict=False)
    aspect: tuple[float, float] = pydantic.Field((1.0, 1.0), strict=False)
    flip: bool = False
    colour: ColourSettings = ColourSettings()
    sound: SoundSettings = SoundSettings()

    def spec(self) -> spec.Augment:
        kept = self.model_dump(exclude={"colour", "sound"})
        colour, sound = self.colour.model_dump(), self.sound.model_dump()
        return spec.Augment(**kept, colour=spec.ColourJitter(**colour), sound=spec.SoundAugment(**sound))


class TaskSettings(_Strict):
    """The tasks by name, one (data set, objective) pair each; every step trains one of them.

    weight: null counts the data set's examples (the paper's rule).

    objective: "nce" or "sigmoid_pairs" compare modalities, "softmax" or "sigmoid" (for several labels a row) classify;
    a mapping such as {nce: 1.0, softmax: 0.5} is the weighted sum over one batch. A classifier looks at the first
    modality that is not text. pair_weights: with three modalities, weights of audio_text, audio_vision and text_vision
    where they are not 1; 0 leaves a pair out. microbatches: the number of parts that a batch is worked through in for
    one update, to save memory; for classification alone, since contrastive losses compare the whole batch.
    """

    data_set: str
    objective: str | dict[str, float]
    modalities: list[Literal["image", "video", "audio", "text"]] = pydantic.Field(min_length=1)
    batch_size: int = pydantic.Field(ge=1)
    weight: float | None = pydantic.Field(None, ge=0)
    variants: list[VariantSettings] = []
    classes: list[str] = []
    text: Literal["captions", "labels"] = "captions"
    text_length: int = pydantic.Field(64, ge=1)
    positives: Literal["labels", "text", "instance"] | None = None
    augment: AugmentSettings = AugmentSettings()
    pair_weights: dict[str, Annotated[float, pydantic.Field(ge=0)]] = {}
    microbatches: int = pydantic.Field(1, ge=1)

    @pydantic.field_validator("objective", mode="before")
    @classmethod
    def _known_terms(cls, given):
        terms = given if isinstance(given, dict) else {str(given): 1.0}
        known = all(name in spec.OBJECTIVES and _positive(weight) for name, weight in terms.items())
        if not terms or not known:
            names = ", ".join(spec.OBJECTIVES)
            raise pydantic_core.PydanticCustomError(
                "objective", f"expected one of {names}, or a mapping of some of them to weights above 0"
            )
        return given

    @property
    def objectives(self) -> tuple[tuple[str, float], ...]:
        """(name, weight) of every term, in the order of ``spec.OBJECTIVES``."""
        terms = self.objective if isinstance(self.objective, dict) else {self.objective: 1.0}
        return tuple((name, terms[name]) for name in spec.OBJECTIVES if name in terms)


def _positive(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


class TrainSettings(_Strict):
    """Steps and the optimiser.

    learning_rate, clip_norm, patch_learning_rate_scale: null follows the largest batch (``recipe.defaults``).
    patch_learning_rate_scale: factor on the learning rate of the patch projections. dense_update: every step updates
    every parameter, those that the task does not use with a gradient of zero; to compare. deterministic: on GPUs too,
    the same losses bit for bit in every run; on CPUs they always are. log_every: steps a line of metrics.jsonl stands
    for. log_samples: the ids of every batch are written too.

    b1, b2, eps, weight_decay: Adam's; the decay is of the matrices of layers and experts alone, in proportion to the
    learning rate. initial_learning_rate: where the warm-up starts. pre_warmup_fraction: share of the steps before it,
    in which the rate goes in a line from pre_warmup_learning_rate to the initial one.
    """

    num_steps: int = pydantic.Field(ge=1)
    learning_rate: float | None = pydantic.Field(None, gt=0)
    warmup_fraction: float = pydantic.Field(0.05, ge=0, lt=1)
    end_learning_rate: float = pydantic.Field(0.0, ge=0)
    clip_norm: float | None = pydantic.Field(None, gt=0)
    patch_learning_rate_scale: float | None = pydantic.Field(None, ge=0)
    dense_update: bool = False
    deterministic: bool = False
    checkpoint_every: int = pydantic.Field(1000, ge=1)
    log_every: int = pydantic.Field(1, ge=1)
    log_samples: bool = False
    b1: float = pydantic.Field(0.9, ge=0, lt=1)
    b2: float = pydantic.Field(0.999, ge=0, lt=1)
    eps: float = pydantic.Field(1e-7, gt=0)
    weight_decay: float = pydantic.Field(0.0, ge=0)
    initial_learning_rate: float = pydantic.Field(0.0, ge=0)
    pre_warmup_fraction: float = pydantic.Field(0.0, ge=0, lt=1)
    pre_warmup_learning_rate: float = pydantic.Field(0.0, ge=0)

    @pydantic.field_validator("pre_warmup_fraction")
    @classmethod
    def _room_for_both(cls, fraction: float, info: pydantic.ValidationInfo) -> float:
        if fraction + info.data.get("warmup_fraction", 0.0) >= 1:
            raise pydantic_core.PydanticCustomError("warmup", "expected less than 1 together with warmup_fraction")
        return fraction


# Keys of TrainSettings that OptimizerConfig has under the same name.
_OPTIMIZER_KEYS = {"b1", "b2", "eps", "weight_decay", "initial_learning_rate", "pre_warmup_learning_rate"}


class StageSettings(_Strict):
    """Weights of tasks from a step on."""

    from_step: int = pydantic.Field(ge=0)
    weights: dict[str, Annotated[float, pydantic.Field(ge=0)]] = pydantic.Field(min_length=1)


class BanditSettings(_Strict):
    """The adaptive sampler: see ``train.sampler.SamplerSpec``."""

    floor: float = pydantic.Field(0.02, ge=0, lt=1)
    lag: int = pydantic.Field(32, ge=8)
    gain: float = pydantic.Field(2.0, ge=0, le=20)


class SamplerSettings(_Strict):
    """Which task each step runs; the paper's rule unless something else is asked for.

    kind: "multinomial" draws tasks in proportion to their weights; "uniform" all alike; "round_robin" runs a task
    whenever a counter is a multiple of its interval; "exact" gives each task its share of every period of steps, in a
    permuted order; "bandit" draws more of what is not learned yet. temperature: weights are raised to 1 / temperature.
    max_weight: no weight (number of examples) counts as more. max_share: no task gets a larger share of the steps.
    variant_weight: a task's weight is "split" over its variants, or each of them has it in "full". intervals: of
    round_robin, 1 where not named. period: steps of exact; null: those of the run. stages: weights over time, e.g.
    [{from_step: 1000, weights: {a: 2, b: 0}}]; ramp: they change linearly from stage to stage.
    """

    kind: Literal[KINDS] = "multinomial"
    temperature: float = pydantic.Field(1.0, gt=0)
    max_weight: float | None = pydantic.Field(None, gt=0)
    max_share: float | None = pydantic.Field(None, gt=0, le=1)
    variant_weight: Literal["split", "full"] = "split"
    intervals: dict[str, Annotated[int, pydantic.Field(ge=1)]] = {}
    period: int | None = pydantic.Field(None, ge=1)
    stages: list[StageSettings] = []
    ramp: bool = False
    bandit: BanditSettings = BanditSettings()


class CheckpointSettings(_Strict):
    """Which checkpoints are kept; a resume may change it.

    keep_last: the number of newest ones. keep_every: those of steps that it divides are kept too, for ever.
    """

    keep_last: int = pydantic.Field(2, ge=1)
    keep_every: int | None = pydantic.Field(None, ge=1)


class InitSettings(_Strict):
    """What a new run starts from.

    from: the directory of another run, whose parameters are taken over where they have the same name and shape, and its
    tokenizer where the recipe names none; the run prints what was and was not. Moments and steps start anew.
    """

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True, serialize_by_alias=True)

    from_: str | None = pydantic.Field(None, alias="from")


class ResumeSettings(_Strict):
    """What a resume may change beside cluster, logging, checkpoint and more steps.

    allow_mixture_change: tasks and data sets may come and go, weights and the sampler may change; the others go on
    where they were.
    """

    allow_mixture_change: bool = False


class ClusterSettings(_Strict):
    """Where the run runs and how its data are decoded; a resume may change it.

    num_workers: 0 trains in the driver's process; N starts N Ray Train workers, one a host with all its devices; [min,
    max] as many as there is room for, and the run goes on with fewer or more when machines go or come.
    max_failures: how often a run goes on by itself from its newest checkpoint after workers were lost; machines
    that were preempted do not count. stall_timeout_s: a worker that finishes nothing for so long ends, with its stacks.
    start_timeout_s: how long to wait for the first workers, where their machines may be yet to come.

    expert_parallel: the number of devices that share the experts of a layer; it divides both their number and the
    devices'. fsdp: parameters and moments lie over the devices, in place of a copy on each.
    decode: "tasks" (pooled Ray tasks), "actors" (a pool of actors a task), or "auto" (actors from 8 CPUs on).
    block_steps: the steps of the run that a block of a stream lasts for, about. queue_blocks: how many it may be ahead.
    decode_timeout_s, decode_memory_mb: what decoding one sample may take; a sample that takes more is a reject.
    compile_cache: folder of compiled steps; null: below the user's cache folder.
    """

    num_workers: int | list[int] = 0
    max_failures: int = pydantic.Field(10, ge=0)
    stall_timeout_s: float = pydantic.Field(900.0, gt=0)
    accelerator: Literal["cpu", "gpu", "tpu"] = "cpu"
    accelerators_per_worker: int = pydantic.Field(1, ge=0)
    cpus_per_worker: float = pydantic.Field(1.0, ge=0)
    topology: str | None = None
    accelerator_type: str | None = None
    address: str | None = None
    start_timeout_s: float = pydantic.Field(1800.0, gt=0)
    expert_parallel: int = pydantic.Field(1, ge=1)
    fsdp: bool = False
    decode: Literal["auto", "tasks", "actors"] = "auto"
    block_steps: int = pydantic.Field(16, ge=1)
    queue_blocks: int = pydantic.Field(2, ge=1)
    clip_cache_mb: int = pydantic.Field(0, ge=0)
    decode_timeout_s: float = pydantic.Field(60.0, gt=0)
    decode_memory_mb: int = pydantic.Field(4096, ge=256)
    compile_cache: str | None = None

    @pydantic.field_validator("num_workers", mode="before")
    @classmethod
    def _number_or_range(cls, given):
        whole = all(type(n) is int for n in (given if isinstance(given, list) else [given]))
        fits = whole and (len(given) == 2 and 1 <= given[0] <= given[1] if isinstance(given, list) else given >= 0)
        if not fits:
            raise pydantic_core.PydanticCustomError(
                "num_workers", "expected a number from 0 on, or [min, max] from 1 on"
            )
        return given

    def decode_limits(self) -> DecodeLimits:
        return DecodeLimits(timeout_s=self.decode_timeout_s, memory_bytes=self.decode_memory_mb << 20)


_Step = Annotated[int, pydantic.Field(ge=1, strict=True)]


class LoggingSettings(_Strict):
    """What a run shows and records meanwhile, beside its metrics.jsonl; a resume may change it.

    progress: "rich" (a live panel), "plain" (a line every progress_every_s), or "auto": the panel on a terminal.
    writers: where the numbers go too, some of "tensorboard", "wandb" and "mlflow"; null: TensorBoard where it is
    installed. project: the name under which wandb and mlflow put the run. profile_steps: [first, last] of the steps to
    trace with jax.profiler. peak_tflops: what one device can do, for the utilisation (mfu); null: by its kind.
    """

    progress: Literal["auto", "rich", "plain", "none"] = "auto"
    progress_every_s: float = pydantic.Field(10.0, gt=0)
    writers: list[Literal["tensorboard", "wandb", "mlflow"]] | None = None
    project: str = pydantic.Field("imp", min_length=1)
    profile_steps: tuple[_Step, _Step] | None = pydantic.Field(None, strict=False)
    peak_tflops: float | None = pydantic.Field(None, gt=0)

    @pydantic.field_validator("profile_steps")
    @classmethod
    def _first_before_last(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps and steps[0] > steps[1]:
            raise pydantic_core.PydanticCustomError("profile_steps", "expected [first, last], rising")
        return steps


class EvaluationSettings(_Strict):
    """What is measured on held-out manifests when the run ends; an empty list measures what the tasks make possible.

    kind: "classify" uses the classifier, "zero_shot" prompts, "retrieval" compares media and captions.
    clips: windows of a row whose results are averaged, evenly spaced over its canonical clip (of a video what
    ``max_frames`` holds, of sound alone the canonical waveform); 1 is the middle of a video and the start of a sound.
    """

    data_set: str
    kind: Literal["zero_shot", "classify", "retrieval"]
    modality: Literal["image", "video", "audio"]
    held_out: str | None = None
    classes: list[str] = []
    prompts: list[str] = []
    name: str | None = None
    clips: int = pydantic.Field(1, ge=1)

    @pydantic.field_validator("clips")
    @classmethod
    def _of_what_lasts(cls, clips: int, info: pydantic.ValidationInfo) -> int:
        if clips > 1 and info.data.get("modality") == "image":
            raise pydantic_core.PydanticCustomError("clips", "expected 1, an image has one view")
        return clips

    @pydantic.field_validator("prompts")
    @classmethod
    def _with_a_place_for_the_class(cls, prompts: list[str]) -> list[str]:
        for prompt in prompts:
            try:
                filled = prompt.format("\0")
            except (KeyError, IndexError, ValueError):
                filled = ""
            if "\0" not in filled:
                raise pydantic_core.PydanticCustomError("prompts", "expected {} where the class goes in every prompt")
        return prompts

    def served_by(self, task: spec.TaskSpec) -> bool:
        """Whether a task trains the heads that this measurement needs."""
        if task.data_set != self.data_set or task.weight == 0:
            return False
        if self.kind == "classify":
            return task.classified == self.modality
        pair = "_".join(sorted((spec.MODEL_MODALITY[self.modality], "text")))
        return self.modality in task.modalities and pair in task.pairs and dict(task.pair_weights).get(pair) != 0


class Recipe(_Strict):
    seed: int = 0
    model: ModelSettings = ModelSettings()
    text: TextSettings = TextSettings()
    data_sets: dict[str, DataSetSettings] = pydantic.Field(min_length=1)
    tasks: dict[str, TaskSettings] = pydantic.Field(min_length=1)
    train: TrainSettings
    sampler: SamplerSettings = SamplerSettings()
    init: InitSettings = InitSettings()
    resume: ResumeSettings = ResumeSettings()
    max_reject_fraction: float = pydantic.Field(0.05, ge=0, le=1)
    evaluate: list[EvaluationSettings] = []
    checkpoint: CheckpointSettings = CheckpointSettings()
    cluster: ClusterSettings = ClusterSettings()
    logging: LoggingSettings = LoggingSettings()

    def to_dict(self) -> dict:
        """Plain YAML types, every default filled in."""
        return self.model_dump(mode="json")

    def optimizer(self) -> OptimizerConfig:
        t = self.train
        return OptimizerConfig(
            peak_learning_rate=t.learning_rate,
            warmup_steps=max(1, round(t.warmup_fraction * t.num_steps)),
            num_steps=t.num_steps,
            end_learning_rate=t.end_learning_rate,
            clip_norm=t.clip_norm,
            patch_scale=t.patch_learning_rate_scale,
            dense_update=t.dense_update,
            pre_warmup_steps=round(t.pre_warmup_fraction * t.num_steps),
            **t.model_dump(include=_OPTIMIZER_KEYS),
        )

    def sampler_spec(self) -> SamplerSpec:
        s = self.sampler
        stages = tuple(Stage(stage.from_step, tuple(stage.weights.items())) for stage in s.stages)
        kept = s.model_dump(exclude={"stages", "intervals", "bandit"})
        return SamplerSpec(stages=stages, intervals=tuple(s.intervals.items()), **kept, **s.bandit.model_dump())

    def model_config_for(self, *, vocab_size: int) -> ModelConfig:
        settings = self.model.model_dump(exclude={"variant", "moe"}, exclude_none=True)
        moe = self.model.moe.model_dump(exclude_none=True)
        return _request(from_variant, self.model.variant, moe=moe, vocab_size=vocab_size, where="model", **settings)

    def data_set_specs(self) -> dict[str, spec.DataSetSpec]:
        return {name: self._data_set(name, s) for name, s in self.data_sets.items()}

    def _data_set(self, name: str, s: DataSetSettings) -> spec.DataSetSpec:
        held_out = {"held_out": s.held_out} if isinstance(s.held_out, str) else s.held_out
        return spec.DataSetSpec(
            name=name,
            manifest=locate(s.manifest),
            held_out={k: locate(v) for k, v in held_out.items()},
            shards=s.shards and locate(s.shards),
            classes=tuple(s.classes),
            image=spec.ImageSpec(**s.image.model_dump()),
            video=spec.VideoSpec(**s.video.model_dump()),
            audio=_request(spec.AudioSpec, where=f"data_sets.{name}.audio", **s.audio.model_dump(exclude={"preset"})),
            max_reject_fraction=s.max_reject_fraction,
            schemes=tuple(s.schemes),
        )

    def task_specs(self) -> dict[str, spec.TaskSpec]:
        return {name: self._task(name, t) for name, t in self.tasks.items()}

    def token_spec(self) -> spec.TokenSpec:
        return spec.TokenSpec()

    def _task(self, name: str, t: TaskSettings) -> spec.TaskSpec:
        kept = {"data_set", "weight", "text", "text_length", "positives", "microbatches"}
        return spec.TaskSpec(
            name=name,
            objectives=t.objectives,
            modalities=tuple(t.modalities),
            classes=tuple(t.classes),
            max_characters=self.text.max_characters,
            augment=t.augment.spec(),
            pair_weights=tuple(sorted(t.pair_weights.items())),
            variants=self._variants(name, t),
            **t.model_dump(include=kept),
        )

    def _variants(self, name: str, t: TaskSettings) -> tuple[spec.Variant, ...]:
        if not {"image", "video"} & set(t.modalities):
            return (spec.Variant(name="all", global_batch_size=t.batch_size),)
        if not t.variants:
            raise RequestError(f"tasks.{name}.variants: expected at least one {{size: ...}} for images or video")
        out = []
        for v in t.variants:
            variant = _request(
                make_variant,
                where=f"tasks.{name}.variants",
                num_frames=v.num_frames if "video" in t.modalities else 0,
                size=v.size,
                drop_rate=v.drop_rate,
                base=out[0] if out else None,
                batch_size=None if out else t.batch_size,
                spec=self.token_spec(),
            )
            out.append(variant)
        return tuple(out)


def _request(function, *args, where: str, **kwargs):
    """Calls a function whose ValueError is the recipe's fault."""
    try:
        return function(*args, **kwargs)
    except ValueError as e:
        raise RequestError(f"{where}: {e}") from e


def section_docs() -> dict[str, str]:
    """Part of a recipe → the line that says what it is: the first of its settings' docstring."""
    types = {name: field.annotation for name, field in Recipe.model_fields.items()}
    # Of a mapping or a list of settings, what it holds.
    types = {name: getattr(kind, "__args__", (kind,))[-1] for name, kind in types.items()}
    return {name: kind.__doc__.partition("\n")[0] for name, kind in types.items() if issubclass(kind, _Strict)}


def locate(uri: str) -> str:
    """An absolute path or URI; "demo:" paths lie in the demo corpus' cache folder."""
    if uri.startswith("demo:"):
        from pipeline.data import demo

        return str(demo.cache_dir() / uri.removeprefix("demo:"))
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


def uses_demo(recipe: Recipe) -> bool:
    return any(s.manifest.startswith("demo:") for s in recipe.data_sets.values())
