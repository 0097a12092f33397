"""From pooled features to what a loss needs: the common space of a modality pair, and the classes of a data set."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ModelConfig
from model.initializers import lecun_normal, normal
from model.shapes import Array, Float


class CommonSpaceHead(nnx.Module):
    """width → common_dim, GELU, → common_dim, LayerNorm."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width, common = config.width, config.common_dim
        self.wi = nnx.Linear(width, common, kernel_init=lecun_normal(fan_in=width), rngs=rngs)
        self.wo = nnx.Linear(common, common, kernel_init=lecun_normal(fan_in=common), rngs=rngs)
        self.norm = nnx.LayerNorm(config.common_dim, epsilon=1e-6, rngs=rngs)

    @jax.named_scope("heads")
    def __call__(self, features: Float[Array, "B D"]) -> Float[Array, "B K"]:
        return self.norm(self.wo(jax.nn.gelu(self.wi(features))))


class Pair(nnx.Module):
    """Two heads, one each way between two modalities, and the pair's learned temperature (the temperature itself).

    The heads are absent where each modality has one for all its pairs (``ModelConfig.heads``).
    """

    def __init__(self, config: ModelConfig, *, modalities: tuple[str, str], rngs: nnx.Rngs):
        if config.heads == "per_pair":
            self.heads = nnx.Dict({m: CommonSpaceHead(config, rngs=rngs) for m in modalities})
        self.tau = nnx.Param(jnp.asarray(config.temperature_init, jnp.float32))
        self.floor = config.temperature_floor

    def project(self, features: Float[Array, "B D"], modality: str) -> Float[Array, "B K"]:
        """One modality in the space it shares with the other; the loss takes it to unit length."""
        return self.heads[modality](features)

    @property
    def temperature(self) -> Float[Array, ""]:
        """relu(tau) with a floor, so that logits stay bounded."""
        return jnp.maximum(self.tau[...], self.floor)


class Offset(nnx.Module):
    """The learned offset of a pair's logits in the sigmoid pair loss (SigLIP starts it at -10)."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.value = nnx.Param(jnp.asarray(-10.0, jnp.float32))


class Classifier(nnx.Module):
    """One linear layer with bias from pooled features to the classes of a data set."""

    def __init__(self, config: ModelConfig, *, num_classes: int, rngs: nnx.Rngs):
        self.linear = nnx.Linear(config.width, num_classes, kernel_init=normal(0.02), rngs=rngs)

    @jax.named_scope("heads")
    def __call__(self, features: Float[Array, "B D"]) -> Float[Array, "B K"]:
        return self.linear(features)
