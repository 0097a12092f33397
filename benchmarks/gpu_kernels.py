"""Parts of the model by themselves, for the GPU table: attention, sparse layers, losses, as sides to be timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import timing
from benchmarks.loss import compile_loss
from benchmarks.moe import layer_side
from model.attention import attend
from model.config import ModelConfig
from model.encoder import FeedForward
from model.moe import MoEFeedForward

HEADS, HEAD_DIM = 16, 64


def _attention(kernel: str, mask: jax.Array | None) -> Callable[..., tuple]:
    """(query, key, value, cotangent) → (output, gradients)."""

    @jax.jit
    def run(query, key, value, cotangent) -> tuple:
        out, backward = jax.vjp(lambda *qkv: attend(*qkv, mask, implementation=kernel), query, key, value)
        return out, *backward(cotangent)

    return run


def attention(num_tokens: int, batch: int, *, masked: bool) -> tuple[dict, dict]:
    """(sides by kernel, kernel → relative error of output and gradients against plain operations in float32)."""
    shape = (batch, num_tokens, HEADS, HEAD_DIM)
    exact = [jax.random.normal(jax.random.key(i), shape) for i in range(4)]
    mask = None
    if masked:
        lengths = np.random.default_rng(0).integers(1, num_tokens + 1, (batch, 1))
        mask = jnp.arange(num_tokens) < lengths
        # Later layers ignore padding, so no gradient comes back through it.
        exact[3] = exact[3] * mask[..., None, None]
    given = [x.astype(jnp.bfloat16) for x in exact]
    with jax.default_matmul_precision("highest"):
        expected = _attention("xla", mask)(*(x.astype(jnp.float32) for x in given))
    sides, errors = {}, {}
    for kernel in ("xla",) if timing.on_cpu() else ("xla", "cudnn"):
        run = _attention(kernel, mask)
        found = run(*given)
        errors[kernel] = {
            name: float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()))
            for name, a, b in zip(("output", "query", "key", "value"), found, expected, strict=True)
        }
        sides[kernel] = timing.waiting(lambda run=run: run(*given))
    return sides, errors


def layers(group: int, config: ModelConfig) -> tuple[dict, int]:
    """(sides of one feed-forward layer, dense and sparse in both forms of dispatch; FLOPs of its products)."""
    num_tokens, num_samples = (256, 128) if not timing.on_cpu() else (16, 8)
    group_samples = max(1, group // 256)
    shape = (num_samples, num_tokens, config.width)
    x, cotangent = (jax.random.normal(jax.random.key(i), shape, jnp.dtype(config.dtype)) for i in range(2))
    sides = {"dense": layer_side(FeedForward(config, rngs=nnx.Rngs(0)), x, cotangent, group=1)}
    for form in ("index", "einsum"):
        layer = MoEFeedForward(_with_dispatch(config, form), rngs=nnx.Rngs(0))
        sides[form] = layer_side(layer, x, cotangent, group=group_samples)
    return sides, 12 * num_samples * num_tokens * config.width * config.mlp_dim


def _with_dispatch(config: ModelConfig, form: str) -> ModelConfig:
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, dispatch=form))


def losses(batch: int) -> tuple[dict, dict]:
    """(sides of NCE with gradients by chunk, GiB of temporaries of each)."""
    rng, common_dim = np.random.default_rng(0), 1024
    first = rng.normal(size=(batch, common_dim)).astype(np.float32)
    second = first + 2 * rng.normal(size=first.shape).astype(np.float32)
    ids = np.stack([np.arange(batch, dtype=np.int32)] * 2, axis=-1)
    given = jax.device_put((first, second, np.float32(0.05), ids))
    sides, temporaries = {}, {}
    for name, chunk in {"plain": None, "1024": 1024, "4096": 4096}.items():
        compiled = compile_loss(chunk, batch=batch, common_dim=common_dim)
        temporaries[name] = compiled.memory_analysis().temp_size_in_bytes / 2**30
        sides[name] = timing.waiting(lambda compiled=compiled: compiled(*given))
    return sides, temporaries
