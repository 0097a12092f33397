"""What a layer costs on a TPU by the compiler's cycles, attention as plain operations and as one kernel, without a TPU.

python -m benchmarks.tpu [--device v4] [--tokens 256] [--layers 4]
python -m benchmarks.tpu --task videocc_text

Needs libtpu (pip install -e '.[plan]'). Compiles the gradient of a dense encoder of the width of imp-l, with norms of
queries and keys, for 65,536 tokens a chip. Times are the cycles that the compiler estimates, for the kernels their
scheduled bundles (pipeline/planning/kernels.py), over the clock. --task: in place of a layer, the step of a task of
configs/imp_l_moe.yaml in its first variant, on 256 v4 with experts over 16 chips. A whole recipe: imp plan
(docs/plan.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from model import sharding
from model.config import ModelConfig
from model.encoder import Encoder
from pipeline import recipe as recipes
from pipeline.files import cache_dir
from pipeline.planning import hardware, kernels
from pipeline.planning.program import Program, read_program
from pipeline.planning.run_plan import run_schedule, setting_of
from pipeline.planning.structures import step_plan

TOKENS_OF_CHIP = 65_536
# A host of each kind.
HOSTS = {"v4": "v4:2x2x1", "v5p": "v5p:2x2x1", "v5e": "v5e:2x2", "v6e": "v6e:2x2"}
SIZES = {"width": 1024, "num_heads": 16, "mlp_dim": 4096, "qk_norm": True, "dtype": "bfloat16"}


def compiled(config: ModelConfig, devices: list, *, num_tokens: int) -> jax.stages.Compiled:
    """The gradient of an encoder over the devices, half of the samples' tokens padding."""
    mesh = sharding.make_mesh(devices)
    batch = len(devices) * TOKENS_OF_CHIP // num_tokens
    graph, params = nnx.split(nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0))))

    def loss(params, x: jax.Array, mask: jax.Array) -> jax.Array:
        return (nnx.merge(graph, params)(x, mask)[0].astype(jnp.float32) ** 2).sum()

    rows, everywhere = sharding.over_batch(mesh), sharding.replicated(mesh)
    shapes = jax.ShapeDtypeStruct((batch, num_tokens, config.width), jnp.bfloat16)
    with jax.set_mesh(mesh):
        jitted = jax.jit(
            jax.grad(loss, (0, 1)), in_shardings=(everywhere, rows, rows), out_shardings=(everywhere, rows)
        )
        return jitted.lower(params, shapes, jax.ShapeDtypeStruct((batch, num_tokens), bool)).compile()


def with_kernels(program: Program, config: ModelConfig, device: str) -> dict[str, float]:
    """Cycles by part of the layer, kernels by name."""
    found = kernels.cycles(program.kernels, config, device)
    assert found is not None
    return program.scopes | found


def print_step(task: str) -> None:
    """Time and memory of a step of the paper's recipe, as ``imp plan`` has them."""
    recipe = recipes.load(Path("configs/imp_l_moe.yaml"), ["cluster.expert_parallel=16"])
    schedule = run_schedule(recipe)
    structure = schedule.structures[task, schedule.tasks[task].variants[0].name]
    setting = setting_of(recipe, hardware.tpu("v4:4x8x8"))
    plan = step_plan(setting, structure, utilization=0.4, cache=cache_dir() / "plans")
    peak = plan.flops / plan.step_s / (256 * setting.machine.device.peak_flops)
    shares = ", ".join(f"{name} {share:.0%}" for name, share in sorted(plan.scopes.items(), key=lambda item: -item[1]))
    print(f"{structure.inputs}, batch {structure.global_batch_size}")
    print(f"{plan.step_s:.3f} s, {peak:.1%} of the peak, {plan.memory['peak'] / 2**30:.2f} GiB ({shares})")
    tokens = structure.global_batch_size * sum(i.num_tokens for i in structure.inputs)
    days = 5e12 / tokens * plan.step_s * 256 / 86400
    print(f"{days:,.0f} chip-days for 5e12 tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=HOSTS, default="v4")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--task", help="a task of the paper's recipe")
    arguments = parser.parse_args()
    if arguments.task:
        print_step(arguments.task)
        return
    machine = hardware.tpu(HOSTS[arguments.device])
    devices = hardware.devices_of(machine)
    for choice in ("xla", "pallas"):
        config = ModelConfig(**SIZES, depth=arguments.layers, attention=choice)
        kernels.clear()
        found = compiled(config, devices, num_tokens=arguments.tokens)
        parts = with_kernels(read_program(found.as_text()), config, arguments.device)
        of_layer = {name: 1e3 * cycles / machine.device.clock / config.depth for name, cycles in parts.items()}
        cells = "  ".join(f"{name} {ms:.2f}" for name, ms in sorted(of_layer.items(), key=lambda item: -item[1]))
        peak = found.memory_analysis().peak_memory_in_bytes / 2**30
        total = sum(of_layer.values())
        print(
            f"{arguments.device} {arguments.tokens} tokens, {choice}: {total:.2f} ms a layer ({cells}), {peak:.2f} GiB"
        )


if __name__ == "__main__":
    main()
