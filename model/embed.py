"""From raw tokens with positions to the encoder's width, and back out: the layers a modality owns.

Shape letters: B batch, N tokens, D width, A position axes. Order: embed, add positions, pre-projection, shared encoder,
post-projection, mean over the real tokens (the release's order; no class token).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ModelConfig
from model.initializers import lecun_normal, normal
from model.layers import Linear, affine
from model.shapes import Array, Bool, Float, Int, UInt8


class PositionEmbedding(nnx.Module):
    """One learned table an axis; the rows of a token are summed, then LayerNorm."""

    def __init__(self, config: ModelConfig, *, buckets: tuple[int, ...], rngs: nnx.Rngs):
        tables = [nnx.Param(normal(0.02)(rngs.params(), (size, config.width))) for size in buckets]
        self.tables = nnx.Dict({f"axis_{axis}": table for axis, table in enumerate(tables)})
        scale = nnx.initializers.constant(config.position_scale)
        self.norm = nnx.LayerNorm(config.width, epsilon=1e-6, scale_init=scale, rngs=rngs)

    def __call__(self, positions: Int[Array, "B N A"]) -> Float[Array, "B N D"]:
        """positions: table rows, already dilated to the tables' size."""
        rows = [table[...][positions[..., axis]] for axis, table in enumerate(self.tables.values())]
        return self.norm(sum(rows))


class PatchProjection(nnx.Module):
    """One matrix from a flattened patch to the width."""

    def __init__(self, config: ModelConfig, *, patch_values: int, rngs: nnx.Rngs):
        init = lecun_normal(fan_in=patch_values)
        self.linear = Linear(patch_values, config.width, dtype=jnp.dtype(config.dtype), kernel_init=init, rngs=rngs)

    def __call__(self, patches: Float[Array, "B N P"]) -> Float[Array, "B N D"]:
        """patches: whole tubelets, or patches of one frame, which count as that frame repeated over the tubelet.

        Summing the kernel over time gives the same as repeating the pixels.

        Raises ValueError when the patch's size does not divide the kernel's.
        """
        kernel, num_values = self.linear.kernel[...], patches.shape[-1]
        if kernel.shape[0] % num_values:
            raise ValueError(f"patches of {num_values} values do not fit a kernel for {kernel.shape[0]} values")
        if kernel.shape[0] != num_values:
            kernel = kernel.reshape(-1, num_values, kernel.shape[1]).sum(0)
        return affine(patches.astype(self.linear.dtype), kernel, self.linear.bias[...])


class ModalityLayers(nnx.Module):
    """Embedder, position tables, pre- and post-projection of one modality."""

    def __init__(self, config: ModelConfig, *, modality: str, rngs: nnx.Rngs):
        self.modality = modality
        dtype = jnp.dtype(config.dtype)
        if modality == "text":
            draw = normal(config.text_embedding_std)
            self.table = nnx.Param(draw(rngs.params(), (config.vocab_size, config.width)))
        else:
            self.patch = PatchProjection(config, patch_values=config.patch_values(modality), rngs=rngs)
        self.position = PositionEmbedding(config, buckets=config.positions(modality), rngs=rngs)
        init = lecun_normal(fan_in=config.width)
        self.pre = Linear(config.width, config.width, dtype=dtype, kernel_init=init, rngs=rngs)
        self.post = Linear(config.width, config.width, dtype=dtype, kernel_init=init, rngs=rngs)
        self.dtype = dtype

    @jax.named_scope("embed")
    def embed(
        self,
        tokens: UInt8[Array, "B N P"] | Float[Array, "B N P"] | Int[Array, "B N"],
        positions: Int[Array, "B N A"],
    ) -> Float[Array, "B N D"]:
        """tokens: uint8 pixels of tubelets or patches, float32 patches of other modalities, or token ids."""
        if self.modality == "text":
            # Looked up, then cast: the gradient of a row is a sum over the batch, and bfloat16 cannot hold one.
            embedded = self.table[...][tokens].astype(self.dtype)
        elif self.modality == "vision":
            embedded = self.patch((tokens.astype(jnp.float32) / 127.5 - 1.0).astype(self.dtype))
        else:
            embedded = self.patch(tokens)
        return self.pre(embedded + self.position(positions).astype(self.dtype))

    @jax.named_scope("heads")
    def pool(self, x: Float[Array, "B N D"], token_mask: Bool[Array, "B N"] | None) -> Float[Array, "B D"]:
        """Post-projection, then the mean over real tokens, in float32."""
        x = self.post(x).astype(jnp.float32)
        if token_mask is None:
            return x.mean(1)
        weight = token_mask.astype(jnp.float32)[..., None]
        return (x * weight).sum(1) / jnp.maximum(weight.sum(1), 1.0)
