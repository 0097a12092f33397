"""The contrastive loss by chunks of columns against all columns together. JSON on standard output.

    python -m benchmarks.loss [--quick]

Value and gradients of ``objectives.nce`` (both sides and the temperature). memory: temporaries by XLA's memory analysis
at a batch of 32,768 in a common space of 1,024, compiled and not run. time: at 4,096 (GPUs: 16,384), in turns, and the
greatest differences there from the plain loss. ``model.contrastive_chunk`` is the size judged; a chunk as large as the
batch is the plain loss.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from model.config import from_variant
from model.objectives import nce

CHUNKS = (512, 1024, 2048, 4096)
# The loss is float32 whatever the dtype of the model.
SIZES = {
    "quick": {
        "common_dim": 64,
        "memory_batch": 4096,
        "time_batch": 1024,
        "chunks": (256, 512),
        "rounds": 2,
        "calls": 1,
    },
    "cpu": {"common_dim": 1024, "memory_batch": 32768, "time_batch": 4096, "chunks": CHUNKS, "rounds": 9, "calls": 1},
    "gpu": {
        "common_dim": 1024,
        "memory_batch": 32768,
        "time_batch": 16384,
        "chunks": CHUNKS,
        "rounds": 11,
        "calls": 10,
    },
}


def compile_loss(chunk: int | None, *, batch: int, common_dim: int) -> jax.stages.Compiled:
    """(first, second, temperature, positive ids) → value and gradients of the first three."""

    def loss(first, second, temperature, ids) -> jax.Array:
        return nce(first, second, temperature=temperature, positive_ids=ids, chunk_size=chunk)

    side = jax.ShapeDtypeStruct((batch, common_dim), jnp.float32)
    shapes = (side, side, jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((batch, 2), jnp.int32))
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile()


def memory(sizes: dict) -> dict[str, int]:
    """Chunk → bytes of temporaries."""
    found = {}
    for name, chunk in _chunks(sizes, batch=sizes["memory_batch"]).items():
        compiled = compile_loss(chunk, batch=sizes["memory_batch"], common_dim=sizes["common_dim"])
        found[name] = compiled.memory_analysis().temp_size_in_bytes
        timing.say(f"{name}: {found[name] / 2**20:.0f} MiB")
    return found


def _chunks(sizes: dict, *, batch: int) -> dict[str, int | None]:
    return {"plain": None} | {str(c): c for c in sizes["chunks"] if c < batch}


def make_arguments(sizes: dict) -> tuple:
    """Pairs that are somewhat alike, as in training; every id twice, so that rows have several positives."""
    rng, shape = np.random.default_rng(0), (sizes["time_batch"], sizes["common_dim"])
    first = rng.normal(size=shape).astype(np.float32)
    second = first + 2 * rng.normal(size=shape).astype(np.float32)
    ids = np.stack([np.arange(sizes["time_batch"], dtype=np.int32) // 2] * 2, axis=-1)
    return jax.device_put((first, second, np.float32(0.05), ids))


def differences(results: dict) -> dict[str, dict[str, float]]:
    """Chunk → the loss's relative difference from the plain one, and the greatest of each gradient over its greatest
    entry."""
    value, gradients = results["plain"]

    def relative(a, b) -> float:
        return float(jnp.abs(a - b).max() / jnp.abs(b).max())

    names = ("first", "second", "temperature")
    return {
        chunk: {"loss": relative(of[0], value)}
        | {n: relative(a, b) for n, a, b in zip(names, of[1], gradients, strict=True)}
        for chunk, of in results.items()
        if chunk != "plain"
    }


def main() -> None:
    args = timing.arguments(__doc__)
    sizes = timing.pick(SIZES, quick=args.quick) | {"dtype": "float32"}
    default = str(min(from_variant("imp-b").contrastive_chunk, max(sizes["chunks"])))
    temporaries = memory(sizes)
    given, compiled = make_arguments(sizes), {}
    for name, chunk in _chunks(sizes, batch=sizes["time_batch"]).items():
        compiled[name] = compile_loss(chunk, batch=sizes["time_batch"], common_dim=sizes["common_dim"])
    found = differences({name: loss(*given) for name, loss in compiled.items()})
    sides = {name: timing.waiting(lambda loss=loss: loss(*given)) for name, loss in compiled.items()}
    times = timing.in_turns(sides, rounds=sizes["rounds"], calls=sizes["calls"])
    over = times.over("plain")
    timing.show(
        {
            "machine": timing.machine(),
            "sizes": sizes,
            "default chunk": default,
            "memory, default over plain": temporaries[default] / temporaries["plain"],
            "time, default over plain": over[default],
            "fastest chunk": min(over, key=over.get),
            "smallest chunk in memory": min(temporaries, key=temporaries.get),
            "temporaries, MiB": {name: size / 2**20 for name, size in temporaries.items()},
            "time over plain": over,
            "time over plain, processor time": times.cpu_over("plain"),
            "ms": {name: 1000 * s for name, s in times.seconds().items()},
            "differences": found,
        }
    )


if __name__ == "__main__":
    main()
