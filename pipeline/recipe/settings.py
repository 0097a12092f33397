"""Every key of a recipe: its type, bounds, default and meaning. ``specs`` turns a recipe into plain data.

Keys that another room owns are declared there (``pipeline.keys``), once for the recipe and for that room.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import pydantic
import pydantic_core

from pipeline import keys
from pipeline.cluster.settings import WorkerSettings
from pipeline.recipe.section import Section, Share, key
from pipeline.recipe.task_settings import DataSetSettings, EvaluationSettings, TaskSettings, TextSettings
from pipeline.train.mixture.settings import SamplerSettings
from pipeline.train.telemetry.settings import LoggingSettings


class MoESettings(Section):
    """The experts of a -moe variant; null leaves what the variant says."""

    num_experts: int | None = key(None, "Experts of a sparse layer.", ge=1)
    num_layers: int | None = key(None, "Layers that are sparse.", ge=1)
    capacity_factor: float | None = key(
        None, "Slots of all experts over the tokens (times num_selected for tokens_choose).", gt=0
    )
    placement: Literal["last", "interleaved"] | None = key(
        None, 'Sparse layers are the "last" ones (the paper\'s), or "interleaved" with dense ones (V-MoE\'s).'
    )
    router: Literal["experts_choose", "tokens_choose"] | None = key(
        None, "Who chooses: an expert its best tokens (the paper's), or a token its best experts while they have room."
    )
    num_selected: int | None = key(None, "Experts that a token chooses, with tokens_choose.", ge=1)
    batch_priority: bool | None = key(
        None, "With tokens_choose, tokens choose in the order of their best probability, not of the batch."
    )
    load_balance_weight: float | None = key(None, "Weight of Switch's load-balancing loss.", ge=0)
    z_loss_weight: float | None = key(None, "Weight of the mean squared logsumexp of the router's logits.", ge=0)
    group: Literal["sample", "tokens"] | None = key(
        None, 'Tokens that compete for experts: those of a "sample", or group_size "tokens" of neighbouring samples.'
    )
    group_size: int | None = key(None, "Maximum tokens of a group, with group: tokens.", ge=1)
    route_padding: bool | None = key(None, "Padding competes for experts too, as in the authors' release.")
    dispatch: Literal["auto", "index", "einsum"] | None = key(
        None, "How tokens reach their experts; results are the same, speed is not."
    )


class ModelSettings(Section):
    """The model: a variant, and what replaces its fields; null leaves what the variant says."""

    variant: str = key("imp-tiny-moe", "Name of the model's size: imp-tiny, imp-s, imp-b or imp-l, each also -moe.")
    moe: MoESettings = MoESettings()
    common_dim: int | None = key(None, "Width of the space in which modalities are compared.", ge=1)
    temperature_init: float | None = key(
        None, "Initial temperature of contrastive losses; null follows the largest batch of a task that compares.", gt=0
    )
    temperature_floor: float | None = key(None, "Smallest temperature that training may reach.", gt=0)
    position_scale: float | None = key(None, "Initial scale of the LayerNorm over position embeddings.", gt=0)
    towers: Literal["shared", "per_modality"] | None = key(
        None, "One encoder for all modalities (the paper's), or one for each."
    )
    heads: Literal["per_pair", "per_modality"] | None = key(
        None,
        "A space and two heads for each pair of modalities (the paper's), or one head a modality into one space, where "
        "all of them can be compared.",
    )
    matryoshka: tuple[int, ...] = key(
        (),
        "Numbers of leading dimensions of the common space that are trained to be of use alone, as in [64, 128, 256], "
        "ascending up to common_dim; [] trains the whole vectors only.",
    )
    attention: Literal["auto", "xla", "cudnn", "pallas"] | None = key(
        None,
        'Kernel of attention: plain operations ("xla"), fused on GPUs ("cudnn") or TPUs ("pallas"), or "auto".',
    )
    remat: Literal["auto", "full", "attention", "dots", "products", "none"] | None = key(
        None,
        'Recomputation in the backward pass to save memory, from "full" (whole layers) over "attention", "dots" and '
        '"products" to "none"; "auto" is "attention", and on GPUs the least that their memory allows.',
    )
    scan: bool | None = key(None, "Layers are one compiled body that runs depth times; false unrolls it.")
    unroll_on_gpu: bool | None = key(None, "On GPUs layers are unrolled whatever scan says, which is faster there.")
    contrastive_chunk: int | None = key(None, "Maximum columns that a contrastive loss compares at a time.", ge=1)
    text_embedding_std: float = key(1.0, "Initial standard deviation of the table of text tokens.", gt=0)
    dtype: Literal["auto", "float32", "bfloat16"] = key(
        "auto", 'Type of the computation; parameters are float32 always. "auto": bfloat16 on accelerators.'
    )


class TrainSettings(Section):
    """Steps and the optimiser."""

    num_steps: int = key(..., "Steps of the run; a resume may take more.", ge=1)
    learning_rate: float | None = key(None, "Learning rate after the warm-up; null follows the largest batch.", gt=0)
    warmup_fraction: float = key(0.05, "Share of the steps in which the learning rate rises.", ge=0, lt=1)
    end_learning_rate: float = key(0.0, "Learning rate at the end of the cosine.", ge=0)
    clip_norm: float | None = key(
        None, "Maximum global norm of the gradient, larger ones are scaled; null follows the largest batch.", gt=0
    )
    patch_learning_rate_scale: float | None = key(
        None, "Factor on the learning rate of the patch projections; null follows the largest batch.", ge=0
    )
    dense_update: bool = key(
        False, "Every step updates every parameter, those that the task does not use with a gradient of zero."
    )
    freeze: list[str] = key(
        [],
        "Groups of parameters that keep their values, such as encoder, embed_vision, or embed for all that begin so; a "
        "step computes nothing backward for them alone.",
    )
    learning_rate_scales: dict[str, Annotated[float, pydantic.Field(gt=0)]] = key(
        {}, "Factors on the learning rate of groups of parameters, named as for freeze; the longest name counts."
    )
    deterministic: bool = key(
        False, "Losses repeat bit for bit on GPUs too, at a cost in speed; on CPUs they always do."
    )
    checkpoint_every: int = key(1000, "Steps between two checkpoints.", ge=1)
    log_every: int = key(1, "Steps between two lines of metrics.jsonl.", ge=1)
    log_samples: bool = key(False, "The ids of every batch are written to samples.jsonl.")
    b1: float = key(0.9, "Adam's decay of the mean of gradients.", ge=0, lt=1)
    b2: float = key(0.999, "Adam's decay of the mean of squared gradients.", ge=0, lt=1)
    eps: float = key(1e-7, "Adam's constant in the denominator.", gt=0)
    weight_decay: float = key(
        0.0, "Decay of the matrices of layers and experts, in proportion to the learning rate (AdamW).", ge=0
    )
    initial_learning_rate: float = key(0.0, "Learning rate at which the warm-up starts.", ge=0)
    pre_warmup_fraction: float = key(
        0.0, "Share of the steps before the warm-up, less than 1 together with warmup_fraction.", ge=0, lt=1
    )
    pre_warmup_learning_rate: float = key(
        0.0, "Learning rate of the first step; it goes in a line to initial_learning_rate before the warm-up.", ge=0
    )

    @pydantic.field_validator("pre_warmup_fraction")
    @classmethod
    def _room_for_both(cls, fraction: float, info: pydantic.ValidationInfo) -> float:
        if fraction + info.data.get("warmup_fraction", 0.0) >= 1:
            raise pydantic_core.PydanticCustomError("warmup", "expected less than 1 together with warmup_fraction")
        return fraction


class CheckpointSettings(Section):
    """The checkpoints that are kept; a resume may change it."""

    keep_last: int = key(2, "Number of newest checkpoints that are kept.", ge=1)
    keep_every: int | None = key(None, "Checkpoints at multiples of this step are kept for ever.", ge=1)
    keep_best: str | None = key(
        None,
        "Metric of logging.evaluate_every whose best checkpoint is kept too, DATA_SET/TASK/METRIC as in eval.json, "
        "such as pets/zero_shot_image/acc1.",
    )


class InitSettings(Section):
    """The start of a new run."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True, serialize_by_alias=True)

    from_: str | None = key(
        None,
        "Directory of another run or of an exported model, whose parameters are taken over where name and shape are "
        "the same, and its tokenizer if the recipe names none; moments and steps start anew.",
        alias="from",
    )


class ResumeSettings(Section):
    """Changes that a resume may make beside cluster, logging, checkpoint and more steps."""

    allow_mixture_change: bool = key(
        False, "Tasks and data sets may come and go, weights and the sampler change; other tasks go on where they were."
    )


@dataclasses.dataclass(frozen=True)
class ClusterSettings(WorkerSettings):
    """Machines and workers of the run, and decoding of its data; a resume may change it."""

    expert_parallel: int = keys.key(
        1, "Devices that share a layer's experts; must divide both the devices and the experts.", ge=1
    )
    fsdp: bool = keys.key(False, "Parameters and moments are spread over the devices, in place of a copy on each.")
    decode: Literal["auto", "tasks", "actors"] = keys.key(
        "auto", 'Streams decode in pooled Ray "tasks", or in "actors" of each rank; "auto": actors from 8 CPUs on.'
    )
    block_steps: int = keys.key(16, "Approximate steps of the run that a block of a stream lasts for.", ge=1)
    decode_ahead: float = keys.key(
        0.3, "Share of Ray's object store for batches that are decoded ahead of training.", gt=0, le=0.8
    )
    decode_cpus: tuple[keys.FromOne, keys.FromOne] | None = keys.key(
        None,
        "[min, max] CPUs that decode for all workers together, asked of an autoscaler while training waits for data; "
        "null: no bounds but the cluster's own.",
    )
    clip_cache_mb: int = keys.key(0, "Megabytes of decoded clips that each decode process keeps.", ge=0)
    decode_timeout_s: float = keys.key(60.0, "Maximum seconds of decoding a sample; slower ones are rejected.", gt=0)
    decode_memory_mb: int = keys.key(4096, "Maximum megabytes of decoding a sample; larger ones are rejected.", ge=256)
    compile_cache: str | None = keys.key(None, "Folder of compiled steps; null: below the user's cache folder.")

    @pydantic.field_validator("num_workers", mode="before")
    @classmethod
    def _number_or_range(cls, given: Any) -> Any:
        whole = all(type(n) is int for n in (given if isinstance(given, list) else [given]))
        fits = whole and (len(given) == 2 and 1 <= given[0] <= given[1] if isinstance(given, list) else given >= 0)
        if not fits:
            raise pydantic_core.PydanticCustomError(
                "num_workers", "expected a number from 0 on, or [min, max] from 1 on"
            )
        # Strict validation of a Python value takes no list for a tuple.
        return tuple(given) if isinstance(given, list) else given


class Recipe(Section):
    """A whole run: data sets, tasks, the model, its training and its evaluation."""

    seed: int = key(0, "Seed of the order of samples, of augmentation and of initial parameters.")
    model: ModelSettings = ModelSettings()
    text: TextSettings = TextSettings()
    modalities: dict[str, str] = key(
        {},
        "Kinds of input beside image, video, audio and text: a name, and the package.module:NAME of its Modality.",
    )
    data_sets: dict[str, DataSetSettings] = key(
        ...,
        "The data sets by name: their manifests, and how their media are decoded where a task or a measurement needs "
        "them.",
        min_length=1,
    )
    tasks: dict[str, TaskSettings] = key(
        ...,
        "The tasks by name, one (data set, objective) pair each; every step trains one of them.",
        min_length=1,
    )
    train: TrainSettings
    sampler: SamplerSettings = SamplerSettings()
    init: InitSettings = InitSettings()
    resume: ResumeSettings = ResumeSettings()
    max_reject_fraction: Share = key(
        0.05, "Maximum share of rejects among a data set's samples; beyond it the run fails."
    )
    evaluate: list[EvaluationSettings] = key(
        [],
        "Measurements on held-out manifests at the end of the run; [] makes all that the tasks allow.",
    )
    checkpoint: CheckpointSettings = CheckpointSettings()
    cluster: ClusterSettings = ClusterSettings()
    logging: LoggingSettings = LoggingSettings()

    def to_dict(self) -> dict:
        """Plain YAML types, every default filled in."""
        return self.model_dump(mode="json")
