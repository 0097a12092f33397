"""Compile time and step time of one contrastive structure at XLA's optimisation levels on CPU, as JSON.

python benchmarks/compile_options.py
"""

import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from model.config import from_variant
from model.imp import Imp, Inputs, Structure
from model.step import OptimizerConfig, init_state, make_step, state_shapes

LEVELS = {"default": {}, "level 1": {"xla_backend_optimization_level": 1}}


def main() -> None:
    structure = Structure("nce", 64, (Inputs("vision", 16, 768, 3), Inputs("text", 8, 0, 1)))
    imp = Imp.for_structures(from_variant("imp-tiny-moe", vocab_size=1000), [structure])
    optimizer = OptimizerConfig(peak_learning_rate=1e-3, warmup_steps=1, num_steps=100)
    shapes = {g: state_shapes(imp)[g] for g in structure.groups}
    lowered = jax.jit(make_step(imp, structure, optimizer)).lower(
        shapes, structure.batch_shapes(), jax.ShapeDtypeStruct((), jnp.int32)
    )
    state = {g: s for g, s in init_state(imp.init(0)).items() if g in structure.groups}
    batch = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), structure.batch_shapes())
    steps, results = {}, {}
    for name, options in LEVELS.items():
        cpu = time.process_time()
        steps[name] = lowered.compile(compiler_options=options)
        results[name] = {"compile_cpu_s": time.process_time() - cpu, "step_s": []}
    for _ in range(20):
        for name, step in steps.items():
            began = time.perf_counter()
            jax.block_until_ready(step(state, batch, jnp.int32(1)))
            results[name]["step_s"].append(time.perf_counter() - began)
    for result in results.values():
        result["step_s"] = statistics.median(result["step_s"])
    first, second = results["default"], results["level 1"]
    ratios = {key: second[key] / first[key] for key in ("compile_cpu_s", "step_s")}
    print(json.dumps({"results": results, "level 1 over default": ratios}, indent=1))


if __name__ == "__main__":
    main()
