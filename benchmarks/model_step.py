"""One training step of the dense model against the same Transformer written plainly. JSON on standard output.

    python -m benchmarks.model_step [--quick]

step: image classification, 256 tokens of 768 uint8 values; every remat policy of ours over ``plain_vit.py`` (Flax, a
loop over layers, no remat) and, where torch is installed, ``torch_vit.py``. Same sizes, precision, clipping and Adam,
batches on the device already. Ours also has a pre- and a post-projection (1 % of the arithmetic at imp-s).
utilisation (GPUs only): model FLOPs a second of an imp-l step over those of a large bf16 matrix product.
parts: shares of a step's time, by ``trace_parts.py``.
Aims, ours over plain: 1.05 on CPUs with remat "none"; 0.95 on GPUs with the policy that is the default.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.plain_vit import PlainViT, plain_step
from benchmarks.trace_parts import time_by_part
from model.config import ModelConfig, OptimizerConfig, from_variant
from model.encoder import REMAT_POLICIES
from model.imp import Imp
from model.sizes import structure_flops
from model.step import CompiledStep, compile_step, init_state
from model.structure import InputShape, Structure
from pipeline.host_memory import machine_cpus

NUM_TOKENS, PATCH_VALUES = 256, 768
NUM_CLASSES = 1000
LEARNING_RATE, CLIP_NORM = 1e-4, 1.0
# calls: steps a timing; waiting after every single one would cost a GPU's step its last microseconds.
SIZES = {
    "quick": {"variant": "imp-tiny", "global_batch_size": 2, "rounds": 2, "calls": 1},
    "cpu": {"variant": "imp-s", "global_batch_size": 4, "rounds": 7, "calls": 1},
    "gpu": {"variant": "imp-b", "global_batch_size": 128, "rounds": 11, "calls": 10},
}
SWEEP = {"variant": "imp-l", "global_batch_sizes": (64, 128, 256), "rounds": 3, "calls": 5}
MATRIX = 8192


class Ours:
    """Compiled steps of our model that take turns on one state."""

    def __init__(self, config: ModelConfig):
        structure = _structure(1)
        self.config = config
        self.optimizer = OptimizerConfig(LEARNING_RATE, warmup_steps=1, num_steps=100, clip_norm=CLIP_NORM)
        self.state = init_state(Imp.for_structures(config, [structure]).init(0))
        self.learning_rate = jnp.float32(LEARNING_RATE)

    def compile(self, *, remat: str, global_batch_size: int) -> CompiledStep:
        config, structure = dataclasses.replace(self.config, remat=remat), _structure(global_batch_size)
        return compile_step(Imp.for_structures(config, [structure]), structure, self.optimizer)

    def side(self, step: CompiledStep, batch: dict) -> timing.Side:
        def call() -> tuple[dict, dict]:
            metrics = step(self.state, batch, self.learning_rate)
            return self.state, metrics

        return timing.waiting(call)


def _structure(global_batch_size: int) -> Structure:
    inputs = (InputShape("vision", NUM_TOKENS, PATCH_VALUES, 3),)
    return Structure(
        "softmax",
        global_batch_size,
        inputs,
        classifier="images",
        num_classes=NUM_CLASSES,
        classes=tuple(range(NUM_CLASSES)),
    )


def make_batch(global_batch_size: int) -> tuple[dict, np.ndarray, np.ndarray]:
    """(our batch on the device, patches, labels) of noise: images have one frame and 16 x 16 patches."""
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (global_batch_size, NUM_TOKENS, PATCH_VALUES), np.uint8)
    labels = rng.integers(0, NUM_CLASSES, global_batch_size).astype(np.int32)
    places = np.stack(np.meshgrid([0], np.arange(16), np.arange(16), indexing="ij"), -1).reshape(1, NUM_TOKENS, 3)
    positions = np.broadcast_to(places, (global_batch_size, NUM_TOKENS, 3)).astype(np.int32)
    batch = {
        "vision": {"tokens": patches, "positions": positions},
        "labels": np.eye(NUM_CLASSES, dtype=np.uint8)[labels],
    }
    return jax.device_put(batch), patches, labels


def plain_side(config: ModelConfig, patches, labels) -> timing.Side:
    vit = PlainViT(config, num_tokens=NUM_TOKENS, patch_values=PATCH_VALUES, num_classes=NUM_CLASSES)
    jitted, state = plain_step(vit, clip_norm=CLIP_NORM, learning_rate=LEARNING_RATE)
    patches, labels = jax.device_put((patches, labels))
    step = jitted.lower(state, patches, labels).compile()

    def call() -> tuple:
        nonlocal state
        state, loss = step(state, patches, labels)
        return state, loss

    return timing.waiting(call)


def torch_sides(config: ModelConfig, patches, labels, *, quick: bool) -> tuple[dict, dict]:
    """(sides, side that cannot run → reason)."""
    if importlib.util.find_spec("torch") is None:
        return {}, {"torch": "not installed"}
    import torch

    from benchmarks.torch_vit import torch_side

    torch.set_num_threads(machine_cpus())
    sides, failed = {}, {}
    for name, compiled in {"torch eager": False, "torch compiled": True}.items():
        if compiled and quick:
            failed[name] = "not with --quick: its C++ compiles for a minute"
            continue
        if not timing.on_cpu() and not torch.cuda.is_available():
            failed[name] = "this torch sees no GPU"
            continue
        try:
            side = torch_side(
                config,
                patches,
                labels,
                num_classes=NUM_CLASSES,
                compiled=compiled,
                clip_norm=CLIP_NORM,
                learning_rate=LEARNING_RATE,
            )
            side(1)
        except Exception as e:  # no C++ compiler, no Triton, no memory beside JAX's: the other sides count
            failed[name] = f"{type(e).__name__}: {str(e).strip().splitlines()[0]}"
        else:
            sides[name] = side
    return sides, failed


def measure_step(sizes: dict, *, quick: bool) -> tuple[dict, dict]:
    """(figures of the step, parts of the time of the policy that the aim is for)."""
    config = from_variant(sizes["variant"], dtype=sizes["dtype"])
    judged = "none" if timing.on_cpu() else config.remat
    size, ours = sizes["global_batch_size"], Ours(config)
    batch, patches, labels = make_batch(size)
    sides = {"plain": plain_side(config, patches, labels)}
    steps = {}
    for remat in REMAT_POLICIES:
        timing.say(f"compiling {remat}")
        steps[remat] = ours.compile(remat=remat, global_batch_size=size)
        sides[f"ours, {remat}"] = ours.side(steps[remat], batch)
    parts = {}
    for remat in dict.fromkeys((judged, config.remat)):
        sides[f"ours, {remat}"](1)
        parts[remat] = time_by_part(steps[remat].executable, sides[f"ours, {remat}"], calls=2)
    torch, failed = torch_sides(config, patches, labels, quick=quick)
    times = timing.in_turns(sides | torch, rounds=sizes["rounds"], calls=sizes["calls"])
    over, seconds = times.over("plain"), times.seconds()
    flops = structure_flops(config, _structure(size))
    figures = {
        "ours over plain": over[f"ours, {judged}"],
        "aim": 1.05 if timing.on_cpu() else 0.95,
        "remat of ours": judged,
        "over plain": over,
        "over plain, processor time": times.cpu_over("plain"),
        "ms": {name: 1000 * s for name, s in seconds.items()},
        "model TFLOP/s": {name: flops / s / 1e12 for name, s in seconds.items()},
        "not measured": failed,
    }
    return figures, parts


def matrix_peak(dtype: str, *, size: int) -> float:
    """FLOPs a second of a square matrix product, the median of five runs of ten."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.dtype(dtype)) for i in range(2))
    multiply = jax.jit(jnp.matmul)
    times = timing.in_turns({"product": timing.waiting(lambda: multiply(a, b))}, rounds=5, calls=10)
    return 2 * size**3 / times.seconds()["product"]


def measure_utilisation(sweep: dict, *, dtype: str, matrix: int) -> dict:
    """Share of the matrix peak that a step's model FLOPs reach, by batch and policy, and the parts of the best."""
    peak, ours = matrix_peak(dtype, size=matrix), Ours(from_variant(sweep["variant"], dtype=dtype))
    found = []
    for size in sweep["global_batch_sizes"]:
        batch, _, _ = make_batch(size)
        for remat in REMAT_POLICIES:
            began = time.perf_counter()
            step = ours.compile(remat=remat, global_batch_size=size)
            at = {"global_batch_size": size, "remat": remat}
            if not _fits(step):
                found.append(at | {"share": 0.0, "failed": "does not fit"})
                continue
            side = ours.side(step, batch)
            times = timing.in_turns({"step": side}, rounds=sweep["rounds"], calls=sweep["calls"])
            seconds = times.seconds()["step"]
            rate = structure_flops(ours.config, _structure(size)) / seconds
            found.append(at | {"share": rate / peak, "ms": 1000 * seconds, "TFLOP/s": rate / 1e12})
            timing.say(f"{found[-1]}, {time.perf_counter() - began:.0f} s with compiling")
    best = max(found, key=lambda f: f["share"])
    step = ours.compile(remat=best["remat"], global_batch_size=best["global_batch_size"])
    batch, _, _ = make_batch(best["global_batch_size"])
    side = ours.side(step, batch)
    side(1)
    return {
        "variant": sweep["variant"],
        "matrix": matrix,
        "matrix peak TFLOP/s": peak / 1e12,
        "best": best,
        "parts of the best": time_by_part(step.executable, side, calls=3),
        "all": found,
    }


def _fits(step: CompiledStep) -> bool:
    memory, stats = step.executable.memory_analysis(), jax.devices()[0].memory_stats()
    if not stats:
        return True
    return memory.temp_size_in_bytes + memory.argument_size_in_bytes < 0.97 * stats["bytes_limit"]


def main() -> None:
    args = timing.arguments(__doc__)
    sizes = timing.pick(SIZES, quick=args.quick)
    result = {"machine": timing.machine(), "sizes": sizes | {"num_tokens": NUM_TOKENS, "num_classes": NUM_CLASSES}}
    result["step"], result["parts"] = measure_step(sizes, quick=args.quick)
    timing.say(str(result["step"]))
    if not timing.on_cpu():
        sweep = SWEEP | ({"variant": "imp-tiny", "global_batch_sizes": (8,)} if args.quick else {})
        result["utilisation"] = measure_utilisation(sweep, dtype=sizes["dtype"], matrix=1024 if args.quick else MATRIX)
    timing.show(result)


if __name__ == "__main__":
    main()
