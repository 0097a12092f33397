"""The effect of XLA's optimisation level and of keeping freed memory on a contrastive step of the demo on CPUs. JSON.

python -m benchmarks.cpu_step
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from model.config import OptimizerConfig, from_variant
from model.imp import Imp
from model.step import init_state, make_step, state_shapes, step_groups
from model.structure import InputShape, Structure
from pipeline.host_memory import keep_freed_memory

LEVELS = {"default": {}, "level 1": {"xla_backend_optimization_level": 1}}
# glibc's default: blocks from 128 kB on are mapped and given back one by one.
KEEP_BYTES = {"given back": 128 << 10, "kept": 1 << 30}
REPEATS = 20


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    structure = Structure((("nce", 1.0),), 64, (InputShape("vision", 16, 768, 3), InputShape("text", 8, 0, 1)))
    imp = Imp.for_structures(from_variant("imp-tiny-moe", vocab_size=1000), [structure])
    optimizer = OptimizerConfig(peak_learning_rate=1e-3, warmup_steps=1, num_steps=100)
    shapes = {g: state_shapes(imp)[g] for g in step_groups(imp, structure, optimizer)}
    lowered = jax.jit(make_step(imp, structure, optimizer)).lower(
        shapes, structure.batch_shapes(), jax.ShapeDtypeStruct((), jnp.float32)
    )
    state = {g: s for g, s in init_state(imp.init(0)).items() if g in shapes}
    batch = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), structure.batch_shapes())
    steps, compile_cpu_s = {}, {}
    for name, options in LEVELS.items():
        cpu = time.process_time()
        steps[name] = lowered.compile(compiler_options=options)
        compile_cpu_s[name] = time.process_time() - cpu
    times = {(level, memory): [] for level in steps for memory in KEEP_BYTES}
    for _ in range(REPEATS):
        for memory, kept in KEEP_BYTES.items():
            keep_freed_memory(kept)
            for level, step in steps.items():
                jax.block_until_ready(step(state, batch, jnp.float32(1e-3)))
                began = time.perf_counter()
                jax.block_until_ready(step(state, batch, jnp.float32(1e-3)))
                times[level, memory].append(time.perf_counter() - began)
    step_s = {" / ".join(key): statistics.median(values) for key, values in times.items()}
    print(
        json.dumps(
            {
                "compile_cpu_s": compile_cpu_s,
                "step_s": step_s,
                "compile, level 1 over default": compile_cpu_s["level 1"] / compile_cpu_s["default"],
                "step, level 1 over default": step_s["level 1 / given back"] / step_s["default / given back"],
                "step, kept over given back": step_s["level 1 / kept"] / step_s["level 1 / given back"],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
