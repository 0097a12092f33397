"""The rows of the GPU table: name → function that returns its figures (``gpu.py`` runs them).

share: model FLOPs a second (``model/sizes.py``) over the data sheet's bfloat16 FLOPs of the device. planned_gib: the
memory that the compiler plans for a step; peak_gib: the device's measured peak, if the row raised it.
"""

from __future__ import annotations

import time
from functools import partial

import jax
import jax.numpy as jnp

from benchmarks import gpu_kernels, gpu_loop, timing
from benchmarks.trace_parts import time_by_part
from model.config import ModelConfig, from_variant
from model.encoder import REMAT_POLICIES
from model.imp import Imp
from model.sharding import make_mesh
from model.sizes import structure_flops
from model.step import OptimizerConfig, compile_step, state_shapes
from model.structure import InputShape, Structure
from pipeline.planning.hardware import here
from pipeline.planning.stand_in import arrays, fill
from pipeline.planning.structures import Setting, step_plan, timed_step
from pipeline.train.devices import peak_flops

OPTIMIZER = OptimizerConfig(peak_learning_rate=1e-4, warmup_steps=10, num_steps=1_000_000)
IMAGE, TEXT = InputShape("vision", 256, 768, 3), InputShape("text", 256, 0, 1)
NUM_CLASSES = 1000


def config_of(variant: str, **fields) -> ModelConfig:
    """A variant in the type of the device; on CPUs its tiny form."""
    if timing.on_cpu():
        variant = "imp-tiny-moe" if variant.endswith("-moe") else "imp-tiny"
    return from_variant(variant, dtype="float32" if timing.on_cpu() else "bfloat16", **fields)


def images(batch: int) -> Structure:
    """Classification of images of 256 tokens."""
    columns = tuple(range(NUM_CLASSES))
    batch = 4 if timing.on_cpu() else batch
    inputs = (IMAGE if not timing.on_cpu() else InputShape("vision", 16, 768, 3),)
    return Structure("softmax", batch, inputs, classifier="images", num_classes=NUM_CLASSES, classes=columns)


def captions(batch: int) -> Structure:
    """Images of 256 tokens with texts of 256 tokens, some of them padding."""
    if timing.on_cpu():
        return Structure("nce", 4, (InputShape("vision", 16, 768, 3), InputShape("text", 16, 0, 1)))
    return Structure("nce", batch, (IMAGE, TEXT))


class Side:
    """A compiled step with its state and batch. compile_s, flops (model FLOPs), planned: bytes."""

    def __init__(self, config: ModelConfig, structure: Structure, **options):
        imp = Imp.for_structures(config, [structure])
        began = time.perf_counter()
        self.step = compile_step(imp, structure, OPTIMIZER, **options)
        self.compile_s = time.perf_counter() - began
        self.flops = structure_flops(config, structure)
        plan = self.step.executable.memory_analysis()
        self.temporary = plan.temp_size_in_bytes
        self.planned = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
        self.planned += self.temporary
        self.state, self.batch = fill(state_shapes(imp)), arrays(structure)

    def __call__(self, calls: int = 1) -> dict:
        for _ in range(calls):
            metrics = self.step(self.state, self.batch, jnp.float32(1e-4))
        return jax.block_until_ready(metrics)


def share(flops: float, seconds: float) -> float | None:
    """Utilisation of the device; None if its peak is unknown."""
    peak = peak_flops(jax.devices()[0].device_kind)
    return flops / seconds / peak if peak else None


def peak_bytes() -> int:
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def seconds_of(sides: dict, *, rounds: int = 3, calls: int = 5) -> dict[str, float]:
    """Side → median seconds of a call, the sides in turns."""
    rounds, calls = (1, 1) if timing.on_cpu() else (rounds, calls)
    return timing.in_turns(sides, rounds=rounds, calls=calls).seconds()


def measure(config: ModelConfig, structure: Structure, **options) -> dict:
    """A step's figures."""
    before = peak_bytes()
    side = Side(config, structure, **options)
    metrics = side(2)
    seconds, after = seconds_of({"step": side})["step"], peak_bytes()
    return {
        "batch": structure.global_batch_size,
        "ms": 1000 * seconds,
        "share": share(side.flops, seconds),
        "compile_s": side.compile_s,
        "planned_gib": side.planned / 2**30,
        "peak_gib": after / 2**30 if after > before else None,
        "temporary_gib": side.temporary / 2**30,
        "loss": float(metrics["loss"]),
    }


def machine() -> dict:
    """The two ceilings: a large bfloat16 product and a large copy, on random data."""
    size = 256 if timing.on_cpu() else 8192
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    long = jax.random.normal(jax.random.key(2), (size, 64 * size), jnp.bfloat16)
    multiply, copy = jax.jit(jnp.matmul), jax.jit(lambda x: -x)
    sides = {"product": timing.waiting(lambda: multiply(a, b)), "copy": timing.waiting(lambda: copy(long))}
    seconds = seconds_of(sides, rounds=5, calls=10)
    found = {"TFLOP/s": 2 * size**3 / seconds["product"] / 1e12, "TB/s": 2 * long.nbytes / seconds["copy"] / 1e12}
    return timing.machine() | found | {"bytes_limit": (jax.devices()[0].memory_stats() or {}).get("bytes_limit")}


def train(variant: str, structure, batch: int) -> dict:
    """A training step with the settings that a GPU takes by default."""
    return measure(config_of(variant), structure(batch))


def planned(variant: str, structure, batch: int) -> dict:
    """A step's plan by ``pipeline.planning`` against the step: time from small blocks, the compiler's memory."""
    setting = Setting(config_of(variant), OPTIMIZER, here())
    plan = step_plan(setting, one := structure(batch), utilization=1.0, cache=None)
    found = timed_step(setting, one, make_mesh(jax.devices())).measure()
    memory = plan.memory["peak"] - plan.memory["program"]
    return {
        "ms": 1000 * found.step_s,
        "planned over measured, time": plan.step_s / found.step_s,
        "gib": found.memory_bytes and found.memory_bytes / 2**30,
        "planned over measured, memory": memory / found.memory_bytes if found.memory_bytes else None,
    }


def remat(policy: str) -> dict:
    """Time and memory of imp-l by remat policy."""
    return measure(config_of("imp-l", remat=policy), images(128))


def scanned(variant: str) -> dict:
    """A step with scanned layers, as on all devices but GPUs."""
    return measure(config_of(variant, unroll_on_gpu=False, remat="products"), images(128))


def moe(variant: str, batch: int, **fields) -> dict:
    """The speed of the sparse model over the dense one of the same FLOPs a token: with the dense variant as it is, and
    with queries and keys normalised as the sparse one's are."""
    sparse = Side(config_of(f"{variant}-moe", **fields), images(batch))
    dense = Side(config_of(variant), images(batch))
    alike = Side(config_of(variant, qk_norm=True), images(batch))
    seconds = seconds_of({"sparse": sparse, "dense": dense, "dense, qk_norm": alike})
    return {
        "batch": batch,
        "over dense": seconds["dense"] / seconds["sparse"],
        "over dense with qk_norm": seconds["dense, qk_norm"] / seconds["sparse"],
        "ms": {name: 1000 * s for name, s in seconds.items()},
        "share": share(sparse.flops, seconds["sparse"]),
        "planned_gib": sparse.planned / 2**30,
    }


def parts(variant: str, structure) -> dict:
    """The parts of a step's time, and its longest operations."""
    side = Side(config_of(variant), structure(128))
    side(2)
    return time_by_part(side.step.executable, side, calls=2, longest=40)


def deterministic(variant: str, dispatch: str) -> dict:
    """The cost of the same bits in every run, and whether runs differ with and without them.

    Two compiles of a step, each run five times from the same state.
    """
    fields = {"moe": {"dispatch": dispatch}} if variant.endswith("-moe") else {}
    config, structure = config_of(variant, **fields), images(128)
    found, seconds = {}, {}
    for name, option in (("free", False), ("deterministic", True)):
        losses = []
        for _ in range(2):
            jax.clear_caches()
            side = Side(config, structure, deterministic=option)
            losses.append([float(side()["loss"]) for _ in range(5)])
            losses[-1].append(float(sum(jnp.abs(x).sum() for x in jax.tree.leaves(side.state["encoder"]["params"]))))
        seconds[name] = seconds_of({name: side})[name]
        found[name] = {"ms": 1000 * seconds[name], "same bits": losses[0] == losses[1], "compile_s": side.compile_s}
        del side
    return found | {"cost": seconds["deterministic"] / seconds["free"]}


def dispatch(group: int) -> dict:
    """One sparse layer of imp-l over the dense one, with gradients, by the tokens of a group."""
    sides, flops = gpu_kernels.layers(group, config_of("imp-l-moe", moe={"group": "tokens"}))
    seconds = seconds_of(sides, calls=10)
    over = {name: s / seconds["dense"] for name, s in seconds.items() if name != "dense"}
    return {"ms": {name: 1000 * s for name, s in seconds.items()}, "time over dense": over, "flops": flops}


def attention(num_tokens: int, batch: int, masked: bool) -> dict:
    """The fused kernel against plain operations, forward and backward, and both against float32."""
    sides, errors = gpu_kernels.attention(num_tokens, 2 if timing.on_cpu() else batch, masked=masked)
    seconds = seconds_of(sides, calls=10)
    found = {"ms": {name: 1000 * s for name, s in seconds.items()}, "error": errors}
    return found | ({"plain over fused": seconds["xla"] / seconds["cudnn"]} if "cudnn" in seconds else {})


def loss(batch: int) -> dict:
    """NCE with gradients by chunks of columns, over all columns together."""
    sides, temporaries = gpu_kernels.losses(64 if timing.on_cpu() else batch)
    seconds = seconds_of(sides)
    over = {name: s / seconds["plain"] for name, s in seconds.items()}
    return {"time over plain": over, "ms": 1000 * seconds["plain"], "temporary_gib": temporaries}


def save(variant: str) -> dict:
    """The cost of a save to the loop and to the steps beside it."""
    structure = images(128)
    config = config_of(variant)
    side = Side(config, structure)
    return gpu_loop.save(side.state, side.step, structure, steps=4 if timing.on_cpu() else 160)


def loop(deterministic: bool) -> dict:
    """The training loop over alternating tasks, saved in the middle and resumed from there.

    Whether the rest is the same bit for bit, and the device's figures in the run's records.
    """
    structures = [images(64), captions(32)]
    config = config_of("imp-s-moe")
    return gpu_loop.resumed(config, structures, OPTIMIZER, deterministic=deterministic)


# Mostly in order of memory, so that peaks show: a device only tells the highest so far.
ROWS = {
    "machine": machine,
    "train/imp-s": partial(train, "imp-s", images, 512),
    "train/imp-b": partial(train, "imp-b", images, 256),
    "train/imp-l, 128": partial(train, "imp-l", images, 128),
    "train/imp-l, captions": partial(train, "imp-l", captions, 128),
    "train/imp-l": partial(train, "imp-l", images, 256),
    "train/imp-l-moe": partial(train, "imp-l-moe", images, 256),
    "planned/imp-l": partial(planned, "imp-l", images, 512),
    "planned/imp-l-moe": partial(planned, "imp-l-moe", images, 512),
    "moe/imp-b": partial(moe, "imp-b", 256),
    "moe/imp-l": partial(moe, "imp-l", 128),
    "moe/imp-l, 256": partial(moe, "imp-l", 256),
    "moe/imp-l, 256, groups of 2,048": partial(moe, "imp-l", 256, moe={"group": "tokens"}),
    "moe/imp-l, 256, index": partial(moe, "imp-l", 256, moe={"dispatch": "index"}),
    "parts/imp-l": partial(parts, "imp-l", images),
    "parts/imp-l-moe": partial(parts, "imp-l-moe", images),
    "parts/imp-l, captions": partial(parts, "imp-l", captions),
    **{f"remat/{policy}": partial(remat, policy) for policy in REMAT_POLICIES},
    "scanned/imp-l": partial(scanned, "imp-l"),
    "deterministic/imp-l": partial(deterministic, "imp-l", "auto"),
    "deterministic/imp-b-moe": partial(deterministic, "imp-b-moe", "auto"),
    "deterministic/imp-b-moe, index": partial(deterministic, "imp-b-moe", "index"),
    **{f"dispatch/{group}": partial(dispatch, group) for group in (256, 512, 1024, 2048)},
    "attention/256": partial(attention, 256, 256, False),
    "attention/256, masked": partial(attention, 256, 256, True),
    "attention/1024": partial(attention, 1024, 64, False),
    "attention/1024, masked": partial(attention, 1024, 64, True),
    "attention/16, masked": partial(attention, 16, 1024, True),
    "attention/64": partial(attention, 64, 512, False),
    **{f"loss/{batch}": partial(loss, batch) for batch in (4096, 16384)},
    "save/imp-l": partial(save, "imp-l"),
    "loop/free": partial(loop, False),
    "loop/deterministic": partial(loop, True),
}
