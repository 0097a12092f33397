"""The plan of each compiled step: memory, time and collectives of one structure on a machine."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import model
import pipeline
from model import sharding, sizes
from model.config import ModelConfig, OptimizerConfig
from model.imp import Imp
from model.step import USABLE, CompiledStep, compile_step, least_recomputed, make_step, state_shapes, step_groups
from model.structure import Structure
from pipeline.data.media.machine import cpu_kind
from pipeline.errors import RequestError
from pipeline.files import write_json
from pipeline.host_memory import machine_cpus
from pipeline.planning import blocks, kernels
from pipeline.planning.hardware import Machine, devices_of
from pipeline.planning.program import Program, read_program, traced_flops
from pipeline.planning.timed_step import TimedStep
from pipeline.train import memory_need
from pipeline.train.forecast import measured_flops_per_s
from pipeline.train.memory_fit import out_of_memory
from pipeline.train.memory_need import Layout, compiled_parts, estimated_parts


@dataclasses.dataclass(frozen=True)
class Setting:
    """All that decides the programs of a run, beside their structures."""

    config: ModelConfig
    optimizer: OptimizerConfig
    machine: Machine
    expert_parallel: int = 1
    fsdp: bool = False
    deterministic: bool = False

    @property
    def layout(self) -> Layout:
        """The devices, and how the state lies over them."""
        platform = self.machine.platform
        return Layout(
            num_devices=self.machine.num_devices,
            expert_parallel=self.expert_parallel,
            fsdp=self.fsdp,
            platform=platform,
            sharing=self.machine.device.per_host if platform == "cpu" else 1,
            freeze=tuple(self.optimizer.freeze),
        )


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """One structure on one machine.

    source: "compiler", or "arithmetic" where nothing could be compiled. memory: bytes of a device (on CPUs of a
    process) by part (``memory_need.compiled_parts``); "peak" is their sum. step_s: by the compiler's cycles
    (collectives left out), by blocks of the model timed on the devices at hand, or by the stated utilization of the
    peak. link_s: collectives alone, at the rate of the links. flops: analytic, on all devices. traced_flops: of the
    products in the program. scopes: share of the cycles by part of the model. gathered_token_bytes: of all-gathers that
    are of tokens. problem: why it cannot run, None if it can.
    """

    source: str
    memory: dict[str, int]
    step_s: float
    link_s: float
    flops: float
    traced_flops: float
    cycles: float
    scopes: dict[str, float]
    collectives: dict[str, list[float]]
    gathered_token_bytes: float
    compile_s: float
    problem: str | None = None


def step_plan(setting: Setting, structure: Structure, *, utilization: float, cache: Path | None) -> StepPlan:
    """The plan of a structure, compiled for the machine or read from the cache; arithmetic for GPUs that are not here.

    Raises RequestError if the devices cannot share the batch.
    """
    # Neither its price nor, where a compiler says the cycles, the utilization changes a plan.
    unpriced = dataclasses.replace(setting.machine, device=dataclasses.replace(setting.machine.device, price=None))
    rate = None if unpriced.device.clock else utilization
    key = repr((dataclasses.replace(setting, machine=unpriced), structure, rate, *_versions()))
    key = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    kept = None if cache is None else cache / f"{key}.json"
    if kept is not None and kept.exists():
        with contextlib.suppress(ValueError, TypeError):
            return StepPlan(**json.loads(kept.read_text()))
    plan = _plan(setting, structure, utilization)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, dataclasses.asdict(plan))
    return plan


def _versions() -> tuple[str, ...]:
    """Other source or another jax is another program, and other CPUs take another time."""
    digest = hashlib.blake2b(digest_size=16)
    for folder in (model, pipeline.planning):
        for path in sorted(Path(folder.__file__).parent.glob("*.py")):
            digest.update(path.read_bytes())
    digest.update(Path(memory_need.__file__).read_bytes())
    return digest.hexdigest(), jax.__version__, cpu_kind(), str(machine_cpus())


def _plan(setting: Setting, structure: Structure, utilization: float) -> StepPlan:
    imp = Imp.for_structures(setting.config, [structure])
    machine = setting.machine
    if machine.platform == "gpu" and not machine.here:
        return _by_arithmetic(setting, structure, utilization)
    mesh = _request(sharding.make_mesh, devices_of(machine), expert=setting.expert_parallel)
    _request(sharding.check_batch, structure, structure.group_samples(setting.config), mesh)
    if machine.platform == "tpu" and not machine.here:
        kernels.clear()
    began = time.perf_counter()
    try:
        step = compile_step(
            imp, structure, setting.optimizer, mesh=mesh, fsdp=setting.fsdp, deterministic=setting.deterministic
        )
    except jax.errors.JaxRuntimeError as e:
        return _too_large(setting, structure, utilization, e)
    compile_s = time.perf_counter() - began
    program = _program(step, setting)
    config = _as_on_gpus(setting, structure) if machine.platform == "gpu" else setting.config

    def timed(block: ModelConfig, part: Structure) -> float:
        return timed_step(dataclasses.replace(setting, config=block), part, mesh).seconds()

    flops = sizes.structure_flops(setting.config, structure)
    device = machine.device
    by_cycles = device.clock and program.cycles
    step_s = program.cycles / device.clock if by_cycles else blocks.step_seconds(config, structure, mesh, timed)
    link_bytes = sum(size for _, size in program.collectives.values())
    return StepPlan(
        source="compiler",
        memory=_with_peak(compiled_parts(step.executable.memory_analysis(), setting.config, structure, setting.layout)),
        step_s=step_s,
        link_s=link_bytes / device.link_bytes,
        flops=flops,
        traced_flops=_traced(imp, structure, setting, mesh),
        cycles=program.cycles,
        scopes={name: cycles / program.cycles for name, cycles in program.scopes.items()} if program.cycles else {},
        collectives=program.collectives,
        gathered_token_bytes=_gathered_tokens(program.gathers, structure, setting),
        compile_s=compile_s,
    )


def _program(step: CompiledStep, setting: Setting) -> Program:
    """The compiled program, with the cycles of its kernels."""
    program = read_program(step.executable.as_text())
    if program.kernels and not setting.machine.here:
        found = kernels.cycles(program.kernels, setting.config, setting.machine.device.name)
        if found is None:
            names = ", ".join(sorted({kernel.kind for kernel in program.kernels}))
            raise RequestError(f"the TPU compiler left no schedule of the kernels {names}, so their time is not known")
        program.cycles += sum(found.values())
        program.scopes["attention"] = program.scopes.get("attention", 0.0) + sum(found.values())
    return program


def timed_step(setting: Setting, structure: Structure, mesh: Mesh) -> TimedStep:
    """A step of a structure that can be run on the devices at hand."""
    imp, fsdp = Imp.for_structures(setting.config, [structure]), setting.fsdp
    step = compile_step(imp, structure, setting.optimizer, mesh=mesh, fsdp=fsdp, deterministic=setting.deterministic)
    return TimedStep(step, imp, structure, mesh=mesh, fsdp=fsdp, freeze=setting.optimizer.freeze)


def _request(function, *arguments, **keywords):
    """The result of a function whose ValueError is the recipe's."""
    try:
        return function(*arguments, **keywords)
    except ValueError as e:
        raise RequestError(f"the recipe does not fit these devices: {e}") from e


def _rate(setting: Setting, utilization: float) -> float:
    """FLOP/s that one device is taken to reach."""
    peak = setting.machine.device.peak_flops
    return (measured_flops_per_s(setting.config) / jax.device_count() if peak is None else peak) * utilization


def _traced(imp: Imp, structure: Structure, setting: Setting, mesh) -> float:
    groups = step_groups(imp, structure, setting.optimizer)
    freeze = setting.optimizer.freeze
    shapes = {name: state for name, state in state_shapes(imp, freeze).items() if name in groups}
    with jax.set_mesh(mesh):
        traced = jax.make_jaxpr(make_step(imp, structure, setting.optimizer))(
            shapes, structure.batch_shapes(), jax.ShapeDtypeStruct((), jnp.float32)
        )
    return traced_flops(traced)


def _gathered_tokens(gathers: dict[int, float], structure: Structure, setting: Setting) -> float:
    """Bytes of the gathers that are neither parameters, whole or a layer's, nor of one row a sample."""
    weights = set()
    for leaf in jax.tree.leaves(Imp.for_structures(setting.config, [structure]).shapes()):
        sizes_of_leaf = {leaf.size, leaf.size // (leaf.shape[0] if leaf.ndim else 1)}
        weights |= sizes_of_leaf | {size // setting.expert_parallel for size in sizes_of_leaf}
    row = max(setting.config.width, setting.config.common_dim, structure.num_classes)
    rows = structure.global_batch_size * row
    return sum(size for values, size in gathers.items() if values > rows and values not in weights)


def _too_large(setting: Setting, structure: Structure, utilization: float, error: Exception) -> StepPlan:
    """A structure that the compiler refuses for its memory. Raises the error again if that is not the reason."""
    if (found := out_of_memory(error)) is None:
        raise error
    words, peak = found
    plan = _by_arithmetic(setting, structure, utilization)
    memory = plan.memory
    if peak is not None:
        # All that arithmetic does not know of is working memory.
        fixed = memory["peak"] - memory["activations"]
        memory = memory | {"activations": max(0, peak - fixed), "peak": max(peak, fixed)}
    return dataclasses.replace(plan, source="compiler", memory=memory, problem=words)


def _by_arithmetic(setting: Setting, structure: Structure, utilization: float) -> StepPlan:
    """Without a compiler: the parts of its memory, and FLOPs at the stated utilization."""
    machine, number = setting.machine, setting.machine.num_devices
    if structure.global_batch_size % number:
        raise RequestError(
            f"a batch of {structure.global_batch_size} samples cannot be shared by {number} devices in equal parts"
        )
    flops = sizes.structure_flops(setting.config, structure)
    config = _as_on_gpus(setting, structure) if machine.platform == "gpu" else setting.config
    return StepPlan(
        source="arithmetic",
        memory=_with_peak(estimated_parts(config, structure, setting.layout)),
        step_s=flops / (_rate(setting, utilization) * number),
        link_s=0.0,
        flops=flops,
        traced_flops=flops,
        cycles=0.0,
        scopes={},
        collectives={},
        gathered_token_bytes=0.0,
        compile_s=0.0,
    )


def _as_on_gpus(setting: Setting, structure: Structure) -> ModelConfig:
    """The config with the remat policy that a step takes on GPUs by default: the one that fits and recomputes least."""
    config, layout = setting.config, setting.layout
    if config.remat != "auto":
        return config
    limit, state = setting.machine.device.memory_bytes, estimated_parts(config, structure, layout)["state"]

    def fits(config: ModelConfig) -> bool:
        parts = estimated_parts(config, structure, layout)
        return parts["gradients"] + parts["activations"] + parts["batch"] < USABLE * limit - state

    return least_recomputed(config, fits)


def _with_peak(parts: dict[str, int]) -> dict[str, int]:
    return parts | {"peak": sum(parts.values())}
