"""The training loop without Ray, for the GPU table: the cost of a save, and whether a resumed run stays the same."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.memory_feed import Batches, make_loop
from benchmarks.save import Run
from model.config import ModelConfig
from model.imp import Imp
from model.sizes import structure_flops
from model.step import OptimizerConfig, compile_step, init_state, state_shapes
from model.structure import Structure
from pipeline.train import devices
from pipeline.train.checkpoint import Checkpoints


def save(state: dict, step, structure: Structure, *, steps: int) -> dict:
    """A run with a save in its middle and one at its end against a run without.

    Seconds of steps are those that the loop records. A save waits for the one before it: ``steps`` must be enough.
    """
    batch, folder = Batches([structure])[structure], Path(tempfile.mkdtemp())
    without = Run(state, batch, step, num_steps=steps, every=None, folder=folder / "none")
    saved = Run(state, batch, step, num_steps=steps, every=steps // 2, folder=folder / "saved")
    shutil.rmtree(folder, ignore_errors=True)
    normal_s = statistics.median(s for s, _ in without.step_s[1:])
    beside = [s for s, busy in saved.step_s if busy]
    return {
        "state_gb": sum(x.nbytes for x in jax.tree.leaves(state)) / 1e9,
        "step_ms": 1000 * normal_s,
        "blocking_ms": 1000 * saved.loop.times.save_s / 2,
        "blocking, steps": saved.loop.times.save_s / 2 / normal_s,
        "steps beside a save over others": statistics.median(beside) / normal_s if beside else None,
        "cost of two saves, s": saved.seconds - without.seconds,
    }


def resumed(
    config: ModelConfig, structures: list[Structure], optimizer: OptimizerConfig, *, deterministic: bool
) -> dict:
    """Twelve steps in alternation, saved after six; the last six again from there, with steps compiled anew."""
    imp, batches = Imp.for_structures(config, structures), Batches(structures)
    order = [batches[structure] for structure in structures * 6]
    half, folder = len(order) // 2, Path(tempfile.mkdtemp())
    records = {"whole": [], "resumed": []}
    checkpoints = Checkpoints(folder, keep_last=4)

    def compiled() -> dict:
        jax.clear_caches()
        return {s: compile_step(imp, s, optimizer, deterministic=deterministic) for s in structures}

    def save(step: int, state: dict) -> None:
        if step == half:
            checkpoints.save(step, state=state, data={})
            checkpoints.wait()

    state = jax.device_put(init_state(imp.init(0)), jax.devices()[0])
    began = time.perf_counter()
    make_loop(state, order, compiled(), record=records["whole"].append, save=save, checkpoint_every=half).run()
    seconds = time.perf_counter() - began
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state_shapes(imp))
    again = checkpoints.state(like, step=half)
    make_loop(again, order[half:], compiled(), record=records["resumed"].append).run()
    shutil.rmtree(folder, ignore_errors=True)
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True)
    last = records["whole"][-1]
    peak = devices.peak_flops(jax.devices()[0].device_kind)
    flops = structure_flops(config, structures[-1])
    return {
        "same losses": [r["loss"] for r in records["whole"][half:]] == [r["loss"] for r in records["resumed"]],
        "same state": all(np.array_equal(a, b) for a, b in pairs),
        "losses": [r["loss"] for r in records["whole"]],
        "step_ms": 1000 * last["step_s"],
        "mfu": flops / last["step_s"] / peak if peak else None,
        "memory": devices.memory(),
        "seconds": seconds,
    }
