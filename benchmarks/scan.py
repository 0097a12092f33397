"""The compile time that scanning over layers saves. JSON on standard output.

    python -m benchmarks.scan [--quick] [--full]

Value and gradients of the encoder (width of imp-s), its layers scanned and unrolled (``ModelConfig(scan=False)``: the
same parameters in the same stacks, cut by layer), at 12 and 24 layers, with --full at 48; beside them ``plain_vit.py``,
unrolled too, each layer with its own parameters. trace: tracing and lowering to StableHLO; compile: XLA, with the
options of training and no cache. Of two runs in turns the shorter one. Batch and tokens are small: they hardly change
the time to compile. Aim, unrolled over scanned: 15 in compile at 24 layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import timing
from benchmarks.plain_vit import PlainViT
from model.config import ModelConfig, from_variant
from model.encoder import Encoder

SIZES = {
    "quick": {"variant": "imp-tiny", "batch": 2, "tokens": 64, "depths": (2, 4), "runs": 1},
    "cpu": {"variant": "imp-s", "batch": 2, "tokens": 64, "depths": (12, 24), "runs": 2},
    "gpu": {"variant": "imp-s", "batch": 2, "tokens": 64, "depths": (12, 24), "runs": 2},
}
REMAT = ("full", "none")
PATCH_VALUES, NUM_CLASSES = 768, 1000


def encoder_function(config: ModelConfig, sizes: dict) -> tuple[Callable, tuple]:
    """(function, its arguments as shapes) for value and gradients of the encoder."""
    graph, params = nnx.split(nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0))))
    x = jax.ShapeDtypeStruct((sizes["batch"], sizes["tokens"], config.width), jnp.dtype(config.dtype))

    def loss(params, x) -> jax.Array:
        return nnx.merge(graph, params)(x)[0].astype(jnp.float32).mean()

    return jax.value_and_grad(loss, argnums=(0, 1)), (params, x)


def plain_function(config: ModelConfig, sizes: dict) -> tuple[Callable, tuple]:
    """The same of the plain Transformer, which has its patch projection and head too."""
    form = {"num_tokens": sizes["tokens"], "patch_values": PATCH_VALUES, "num_classes": NUM_CLASSES}
    graph, params = nnx.split(nnx.eval_shape(lambda: PlainViT(config, **form)))
    patches = jax.ShapeDtypeStruct((sizes["batch"], sizes["tokens"], PATCH_VALUES), jnp.uint8)
    return jax.value_and_grad(lambda params, x: nnx.merge(graph, params)(x).mean()), (params, patches)


def seconds_of(function, shapes) -> dict[str, float]:
    """Of tracing with lowering, of compiling (on the clock and of processors), and of both, with nothing left of
    earlier runs."""
    jax.clear_caches()
    # As step.compile_step compiles.
    options = {"xla_backend_optimization_level": 1} if timing.on_cpu() else {}
    began = time.perf_counter()
    lowered = jax.jit(function).lower(*shapes)
    traced, cpu = time.perf_counter(), time.process_time()
    lowered.compile(compiler_options=options)
    ended, cpu = time.perf_counter(), time.process_time() - cpu
    return {"trace": traced - began, "compile": ended - traced, "compile, processors": cpu, "total": ended - began}


def measure(depth: int, sizes: dict) -> dict:
    """Seconds of every form at one depth, and unrolled over scanned by remat policy."""
    base = from_variant(sizes["variant"], dtype=sizes["dtype"], depth=depth)
    forms = {
        f"{'scanned' if scan else 'unrolled'}, {remat}": (encoder_function, {"scan": scan, "remat": remat})
        for remat in REMAT
        for scan in (True, False)
    } | {"plain": (plain_function, {})}
    runs = {name: [] for name in forms}
    for _ in range(sizes["runs"]):
        for name, (build, fields) in forms.items():
            runs[name].append(seconds_of(*build(ModelConfig(**(vars(base) | fields)), sizes)))
            timing.say(f"{depth} layers, {name}: {runs[name][-1]}")
    seconds = {name: {part: min(run[part] for run in each) for part in each[0]} for name, each in runs.items()}
    ratios = {f"unrolled over scanned, {remat}": _over(seconds, "unrolled", "scanned", remat) for remat in REMAT}
    ratios["plain over scanned, none"] = {
        part: value / seconds["scanned, none"][part] for part, value in seconds["plain"].items()
    }
    return {"ratios": ratios, "seconds": seconds}


def _over(seconds: dict, name: str, base: str, remat: str) -> dict[str, float]:
    of_base = seconds[f"{base}, {remat}"]
    return {part: value / of_base[part] for part, value in seconds[f"{name}, {remat}"].items()}


def _slopes(found: dict[int, dict]) -> dict[str, float]:
    """Form → seconds that a layer adds between the smallest and the largest depth."""
    low, high = min(found), max(found)
    first, last = found[low]["seconds"], found[high]["seconds"]
    return {name: (last[name]["compile"] - first[name]["compile"]) / (high - low) for name in first}


def main() -> None:
    args = timing.arguments(__doc__, full="48 layers too")
    jax.config.update("jax_enable_compilation_cache", False)
    sizes = timing.pick(SIZES, quick=args.quick)
    if args.full:
        sizes["depths"] = (*sizes["depths"], 48)
    # Libraries that jax and XLA load once are no part of a compile's time.
    seconds_of(*encoder_function(from_variant("imp-tiny", depth=1, dtype=sizes["dtype"]), sizes))
    found = {depth: measure(depth, sizes) for depth in sizes["depths"]}
    judged = found[24 if 24 in found else max(found)]["ratios"]
    timing.show(
        {
            "machine": timing.machine(),
            "sizes": sizes,
            "compile, unrolled over scanned": {
                remat: judged[f"unrolled over scanned, {remat}"]["compile"] for remat in REMAT
            },
            "aim": 15,
            "compile seconds a further layer": _slopes(found),
            "layers": found,
        }
    )


if __name__ == "__main__":
    main()
