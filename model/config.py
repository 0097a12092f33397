"""Sizes of the model as frozen dataclasses, and the table that expands a variant's name into them.

Widths, depths and head counts of imp-s/b/l: the paper's S, B and L. Everything that changes a compiled graph is here,
so two equal configs give equal graphs.
"""

from __future__ import annotations

import dataclasses
import difflib

MODALITIES = ("vision", "audio", "text")
REMAT = ("none", "full", "dots")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Mixture-of-Experts layers: the last ``num_layers`` of the encoder (paper: the last 6 of 12 for S and B).

    group: "sample" lets the tokens of one sample compete for the experts, so that a result never depends on the rest
      of the batch; "tokens" lets up to ``group_size`` tokens of neighbouring samples compete (the authors' release).
    """

    num_experts: int
    num_layers: int
    capacity_factor: float = 1.0
    group: str = "sample"
    group_size: int = 2048


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One shared encoder and the sizes of what surrounds it.

    positions: buckets of each learned position table at the largest input (vision T, H, W; audio T, F; text T).
    dtype: of the computation; parameters are float32 always.
    position_scale: initial scale of the LayerNorm over the summed position rows (1 in the release). Smaller, the pooled
      features of two samples differ more at the start, and contrastive losses leave log(batch) sooner.
    remat: one of REMAT; what they keep is in ``encoder.REMAT_POLICIES``.
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
    remat: str = "full"
    dtype: str = "float32"

    def __post_init__(self):
        if self.num_heads * self.head_dim != self.width:
            raise ValueError(
                f"width {self.width} must be num_heads {self.num_heads} x head_dim {self.head_dim} = "
                f"{self.num_heads * self.head_dim}"
            )
        if self.moe and not 0 < self.moe.num_layers <= self.depth:
            raise ValueError(f"moe.num_layers {self.moe.num_layers} must be between 1 and depth {self.depth}")
        if self.moe and (self.moe.num_experts < 1 or self.moe.capacity_factor <= 0):
            raise ValueError(
                f"moe needs experts and capacity, found num_experts {self.moe.num_experts}, "
                f"capacity_factor {self.moe.capacity_factor}"
            )
        if self.remat not in REMAT:
            raise ValueError(f"unknown remat policy {self.remat!r}; known: {', '.join(REMAT)}")
        if self.moe and self.moe.group not in ("sample", "tokens"):
            raise ValueError(f"moe.group is {self.moe.group!r}; known: sample, tokens")

    def positions(self, modality: str) -> tuple[int, ...]:
        """Buckets of the position tables of a modality."""
        return {"vision": self.vision_positions, "audio": self.audio_positions, "text": self.text_positions}[modality]


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
