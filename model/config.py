"""Sizes of the model as frozen dataclasses, and the table that expands a variant's name into them.

Widths, depths and head counts of imp-s/b/l: the paper's S, B and L. Everything that changes a compiled graph is here,
so two equal configs give equal graphs.
"""

from __future__ import annotations

import dataclasses
import difflib
import math

MODALITIES = ("vision", "audio", "text")
# Vocabulary size of a model without text; no step uses its table of tokens.
NO_VOCABULARY = 16

# Settings with a fixed list of values; the first is the default.
CHOICES = {
    "remat": ("auto", "attention", "full", "dots", "products", "none"),
    "towers": ("shared", "per_modality"),
    "heads": ("per_pair", "per_modality"),
    "attention": ("auto", "xla", "cudnn", "pallas"),
    "dtype": ("float32", "bfloat16", "auto"),
}
MOE_CHOICES = {
    "placement": ("last", "interleaved"),
    "router": ("experts_choose", "tokens_choose"),
    "group": ("sample", "tokens"),
    "dispatch": ("auto", "index", "einsum"),
}


def _check_choices(config: ModelConfig | MoEConfig, choices: dict[str, tuple[str, ...]], prefix: str = "") -> None:
    for name, known in choices.items():
        found = getattr(config, name)
        if found not in known:
            raise ValueError(f"{prefix}{name} is {found!r}; known: {', '.join(sorted(known))}")


def _check_matryoshka(dims: tuple[int, ...], common_dim: int) -> None:
    if dims and (list(dims) != sorted(set(dims)) or dims[0] < 1 or dims[-1] != common_dim):
        raise ValueError(
            f"matryoshka: expected ascending numbers of dimensions of which the last is common_dim {common_dim}, found "
            f"{list(dims)}; add {common_dim}, or set common_dim"
        )


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Mixture-of-Experts layers of the encoder.

    placement: "last", the paper's: the last ``num_layers``; "interleaved": every (depth / num_layers)-th, as V-MoE.
    router: "experts_choose", the paper's: an expert takes its best tokens; "tokens_choose": a token takes its
      ``num_selected`` best experts while they have room, tokens in the order of the batch or, with ``batch_priority``,
      of their best probability. The rest of the tokens-choose settings: ``load_balance_weight`` of Switch's loss.
    capacity_factor: slots of all experts together over the tokens (over tokens x num_selected for tokens_choose).
    z_loss_weight: of the mean squared logsumexp of the router's logits, added for every sparse layer and pass.
      The paper has none of these losses.
    group: "sample" lets the tokens of one sample compete for the experts, so that a result never depends on the rest
      of the batch; "tokens" lets up to ``group_size`` tokens of neighbouring samples compete (the authors' release).
    route_padding: padding competes as real tokens do (the authors' release).
    dispatch: "index" gathers and scatters, "einsum" multiplies with one-hot masks; "auto": see ``moe.dispatch_form``.
    """

    num_experts: int
    num_layers: int
    capacity_factor: float = 1.0
    placement: str = "last"
    router: str = "experts_choose"
    num_selected: int = 1
    batch_priority: bool = False
    load_balance_weight: float = 0.0
    z_loss_weight: float = 0.0
    group: str = "sample"
    group_size: int = 2048
    route_padding: bool = False
    dispatch: str = "auto"

    def __post_init__(self) -> None:
        _check_choices(self, MOE_CHOICES, "moe.")
        if self.num_experts < 1 or self.capacity_factor <= 0 or self.group_size < 1:
            raise ValueError(
                f"moe needs experts, capacity and a group of tokens, found num_experts {self.num_experts}, "
                f"capacity_factor {self.capacity_factor}, group_size {self.group_size}"
            )
        if not 1 <= self.num_selected <= self.num_experts:
            raise ValueError(f"moe.num_selected {self.num_selected} must be from 1 to num_experts {self.num_experts}")


@dataclasses.dataclass(frozen=True)
class PatchEmbedder:
    """Layers of a modality beside vision, audio and text: a matrix for float32 patches and a position table an axis.

    num_values: values of a patch. positions: rows of each table.
    """

    name: str
    num_values: int
    positions: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One shared encoder and the sizes of what surrounds it.

    positions: buckets of each learned position table at the largest input (vision T, H, W; audio T, F; text T).
    dtype: of the computation; parameters are float32 always. "auto" is settled before a model is built.
    position_scale: initial scale of the LayerNorm over the summed position rows (1 in the release). Smaller, the pooled
      features of two samples differ more at the start, and contrastive losses leave log(batch) sooner.
    text_embedding_std: standard deviation of the table of text tokens at the start. The release's is 1 / sqrt(width),
      against position rows of length sqrt(width) after their LayerNorm; with 1 both weigh alike.
    towers: "shared", the paper's one encoder, or "per_modality", one each (its Figure 6 compares them).
    heads: "per_pair", the paper's: a pair of modalities is compared in a space of its own; "per_modality": one head
      each into one space, so that any two modalities can be compared.
    matryoshka: numbers of leading dimensions of the common space that contrastive losses train to be of use alone
      (``objectives.nested``), ascending up to ``common_dim``; () trains the whole vectors only.
    attention: "cudnn" is the fused kernel of GPUs, "pallas" that of TPUs, where each takes the shapes; "xla" plain
      operations; "auto": see ``attention.implementation`` and ``SelfAttention.in_tpu_kernel``.
    remat: what the backward pass recomputes (``encoder.REMAT_POLICIES``); "auto": on GPUs as little as their memory
      allows (``step.compile_step``), elsewhere "attention".
    scan: a stack of layers is one compiled body that runs depth times; False unrolls it, to compare.
    unroll_on_gpu: on GPUs it is unrolled all the same: writing arrays into stacks and reading them again would take a
      seventh of a step there.
    contrastive_chunk: maximum number of columns of a contrastive loss that are compared at a time.
    embedders: modalities beside ``MODALITIES``.
    """

    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    moe: MoEConfig | None = None
    qk_norm: bool = False
    head_dim: int = 64
    common_dim: int = 1024
    vocab_size: int = 32_100
    vision_patch: tuple[int, int, int] = (4, 16, 16)
    audio_patch: tuple[int, int] = (16, 16)
    vision_positions: tuple[int, int, int] = (16, 32, 32)
    audio_positions: tuple[int, int] = (64, 8)
    text_positions: tuple[int] = (4096,)
    temperature_init: float = 0.2
    temperature_floor: float = 0.01
    position_scale: float = 1.0
    text_embedding_std: float = 1.0
    towers: str = "shared"
    heads: str = "per_pair"
    matryoshka: tuple[int, ...] = ()
    attention: str = "auto"
    remat: str = "auto"
    scan: bool = True
    unroll_on_gpu: bool = True
    contrastive_chunk: int = 1024
    dtype: str = "float32"
    embedders: tuple[PatchEmbedder, ...] = ()

    def __post_init__(self) -> None:
        _check_choices(self, CHOICES)
        if self.num_heads * self.head_dim != self.width:
            raise ValueError(
                f"width {self.width} must be num_heads {self.num_heads} x head_dim {self.head_dim} = "
                f"{self.num_heads * self.head_dim}"
            )
        if not 0 < self.temperature_floor <= self.temperature_init:
            raise ValueError(
                f"expected 0 < temperature_floor <= temperature_init, found {self.temperature_floor} and "
                f"{self.temperature_init}"
            )
        if not self.text_embedding_std > 0:
            raise ValueError(f"text_embedding_std must be above 0, found {self.text_embedding_std}")
        if self.contrastive_chunk < 1:
            raise ValueError(f"contrastive_chunk must be at least 1, found {self.contrastive_chunk}")
        _check_matryoshka(self.matryoshka, self.common_dim)
        if self.moe is None:
            return
        if not 0 < self.moe.num_layers <= self.depth:
            raise ValueError(f"moe.num_layers {self.moe.num_layers} must be between 1 and depth {self.depth}")
        if self.moe.placement == "interleaved" and self.depth % self.moe.num_layers:
            raise ValueError(
                f"interleaved placement needs a depth that moe.num_layers divides, found depth {self.depth} and "
                f"moe.num_layers {self.moe.num_layers}"
            )

    def positions(self, modality: str) -> tuple[int, ...]:
        """Buckets of the position tables of a modality."""
        built_in = {"vision": self.vision_positions, "audio": self.audio_positions, "text": self.text_positions}
        return (built_in | {e.name: e.positions for e in self.embedders})[modality]

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that a model of this config can have."""
        return (*MODALITIES, *(e.name for e in self.embedders))

    def patch_values(self, modality: str) -> int:
        """Values of a whole patch of a modality; 0 for text."""
        built_in = {"vision": 3 * math.prod(self.vision_patch), "audio": math.prod(self.audio_patch), "text": 0}
        return (built_in | {e.name: e.num_values for e in self.embedders})[modality]

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The layers that are mixtures of experts, counted from 0."""
        if self.moe is None:
            return ()
        if self.moe.placement == "last":
            return tuple(range(self.depth - self.moe.num_layers, self.depth))
        period = self.depth // self.moe.num_layers
        return tuple(range(period - 1, self.depth, period))


def _sparse(num_experts: int, num_layers: int) -> dict:
    # The release normalises queries and keys in MoE models only, and starts them at temperature 1 (facts: model/ and
    # "high temperature to allow fast convergence during warmup").
    return {"moe": MoEConfig(num_experts, num_layers), "qk_norm": True, "temperature_init": 1.0}


_TINY = {
    "width": 128,
    "depth": 3,
    "num_heads": 2,
    "mlp_dim": 256,
    "common_dim": 128,
    "text_positions": (512,),
    "position_scale": 0.3,
}
_S = {"width": 384, "depth": 12, "num_heads": 6, "mlp_dim": 1536}
_B = {"width": 768, "depth": 12, "num_heads": 12, "mlp_dim": 3072}
_L = {"width": 1024, "depth": 24, "num_heads": 16, "mlp_dim": 4096}

VARIANTS: dict[str, dict] = {
    "imp-tiny": _TINY,
    # All layers sparse: one stack compiles in three quarters of the time of two, and the demo compiles nine graphs.
    "imp-tiny-moe": _TINY | _sparse(4, 3),
    "imp-s": _S,
    "imp-s-moe": _S | _sparse(4, 6),
    "imp-b": _B,
    "imp-b-moe": _B | _sparse(16, 6),
    "imp-l": _L,
    "imp-l-moe": _L | _sparse(16, 12),
}


def from_variant(name: str, *, moe: dict | None = None, **overrides) -> ModelConfig:
    """The config of a named variant, with fields replaced.

    moe: fields of MoEConfig to replace; ignored names raise.
    Raises ValueError for an unknown variant, an unknown field, or ``moe`` on a dense variant.
    """
    if name not in VARIANTS:
        nearest = difflib.get_close_matches(name, VARIANTS, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"unknown model variant {name!r}{hint} Known: {', '.join(VARIANTS)}")
    fields = dict(VARIANTS[name])
    if moe:
        if "moe" not in fields:
            raise ValueError(f"model variant {name!r} is dense; moe settings {sorted(moe)} need a -moe variant")
        unknown = set(moe) - {f.name for f in dataclasses.fields(MoEConfig)}
        if unknown:
            raise ValueError(f"unknown moe settings {sorted(unknown)}")
        fields["moe"] = dataclasses.replace(fields["moe"], **moe)
    unknown = set(overrides) - {f.name for f in dataclasses.fields(ModelConfig)}
    if unknown:
        raise ValueError(f"unknown model settings {sorted(unknown)}")
    return ModelConfig(**(fields | overrides))


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Adam, warmup then cosine (paper section 4.1; b2, eps and clipping as in the release).

    initial_learning_rate: where the warmup starts. pre_warmup_steps: steps before it, in which the rate goes in a line
      from ``pre_warmup_learning_rate`` to the initial one (the release's way to start without diverging).
    weight_decay: of the matrices of layers and experts, in proportion to the learning rate (AdamW); none in the paper.
    patch_scale: factor on the learning rate of the patch projections. Their inputs are thousands of correlated values
      far from zero, so that Adam's equal steps on every weight add up; at high rates that drowns all samples in one
      common output (Chen et al. 2021, arXiv 2104.02057, freeze the layer for the same reason).
    dense_update: every step updates every group of the model, those of other tasks with a gradient of zero, as the
      authors' release does; to compare. Every graph then depends on all tasks.
    freeze: groups that keep their values, by the names that ``groups.named`` knows: they have no moments, and nothing
      is computed for them backward.
    learning_rate_scales: (groups by the same names, factor on their learning rate).
    """

    peak_learning_rate: float
    warmup_steps: int
    num_steps: int
    end_learning_rate: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-7
    weight_decay: float = 0.0
    initial_learning_rate: float = 0.0
    pre_warmup_steps: int = 0
    pre_warmup_learning_rate: float = 0.0
    clip_norm: float = 1.0
    patch_scale: float = 1.0
    dense_update: bool = False
    freeze: tuple[str, ...] = ()
    learning_rate_scales: tuple[tuple[str, float], ...] = ()
