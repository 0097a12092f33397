"""The plan of each compiled step: memory, time and collectives of one structure on a machine."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import model
import pipeline
from model import sharding, sizes
from model.config import ModelConfig, OptimizerConfig
from model.imp import Imp
from model.step import CompiledStep, compile_step, make_step, state_shapes, step_groups
from model.structure import Structure
from pipeline.errors import RequestError, one_line
from pipeline.files import write_json
from pipeline.planning import kernels
from pipeline.planning.hardware import Machine, devices_of
from pipeline.planning.program import Program, read_program, traced_flops
from pipeline.train.forecast import measured_flops_per_s

_OUT_OF_MEMORY = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclasses.dataclass(frozen=True)
class Setting:
    """All that decides the programs of a run, beside their structures."""

    config: ModelConfig
    optimizer: OptimizerConfig
    machine: Machine
    expert_parallel: int = 1
    fsdp: bool = False
    deterministic: bool = False


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """One structure on one machine.

    source: "compiler", or "arithmetic" where nothing could be compiled. memory: bytes of a device by part; "peak" is
    all that counts, program included. step_s: by the compiler's cycles (collectives left out), else by the stated
    utilization of the peak. link_s: collectives alone, at the rate of the links. flops: analytic, on all devices;
    traced_flops: of the products in the program. scopes: share of the cycles by part of the model. problem: why it
    cannot run, None if it can.
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
    tokens_gathered: bool
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
    """Other source or another jax is another program."""
    digest = hashlib.blake2b(digest_size=16)
    for root in (model, pipeline.planning):
        for path in sorted(Path(root.__file__).parent.glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest(), jax.__version__


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
    flops = sizes.structure_flops(setting.config, structure)
    device = machine.device
    if device.clock and program.cycles:
        step_s = program.cycles / device.clock
    else:
        step_s = flops / (_rate(setting, utilization) * machine.num_devices)
    link_bytes = sum(size for _, size in program.collectives.values())
    return StepPlan(
        source="compiler",
        memory=_memory(step.executable.memory_analysis(), imp, structure, setting, mesh),
        step_s=step_s,
        link_s=link_bytes / device.link_bytes,
        flops=flops,
        traced_flops=_traced(imp, structure, setting, mesh),
        cycles=program.cycles,
        scopes={name: cycles / program.cycles for name, cycles in program.scopes.items()} if program.cycles else {},
        collectives=program.collectives,
        tokens_gathered=_gathers_tokens(program.collectives, structure, setting),
        compile_s=compile_s,
    )


def _program(step: CompiledStep, setting: Setting) -> Program:
    """The compiled program, with the cycles of its kernels."""
    program = read_program(step.executable.as_text())
    if program.kernels:
        found = kernels.cycles(program.kernels, setting.config, setting.machine.device.name)
        if found is None:
            names = ", ".join(sorted({kernel.kind for kernel in program.kernels}))
            raise RequestError(f"the TPU compiler left no schedule of the kernels {names}, so their time is not known")
        program.cycles += sum(found.values())
        program.scopes["attention"] = program.scopes.get("attention", 0.0) + sum(found.values())
    return program


def _request(function, *arguments, **keywords):
    """The result of a function whose ValueError is the recipe's."""
    try:
        return function(*arguments, **keywords)
    except ValueError as e:
        raise RequestError(f"the recipe does not fit these devices: {e}") from e


# Measured once for all structures.
_measured_rate = functools.cache(measured_flops_per_s)


def _rate(setting: Setting, utilization: float) -> float:
    """FLOP/s that one device is taken to reach."""
    peak = setting.machine.device.peak_flops
    if setting.machine.here and peak is None:
        return _measured_rate(setting.config) / jax.device_count() * utilization
    assert peak is not None
    return peak * utilization


def _memory(found, imp: Imp, structure: Structure, setting: Setting, mesh) -> dict[str, int]:
    """Bytes of one device. The compiler's own peak, where it has one, counts the arguments in."""
    arguments = found.argument_size_in_bytes
    planned = arguments + found.output_size_in_bytes - found.alias_size_in_bytes + found.temp_size_in_bytes
    peak = getattr(found, "peak_memory_in_bytes", 0) or planned
    if setting.machine.platform == "cpu":
        # The CPU's allocator puts all temporaries into one arena.
        peak = planned * len(mesh.devices.flat)
    batch = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(structure.batch_shapes())) // mesh.size
    return {
        "peak": int(peak + found.generated_code_size_in_bytes),
        "state": int(arguments - batch),
        "batch": int(batch),
        "program": int(found.generated_code_size_in_bytes),
    }


def _traced(imp: Imp, structure: Structure, setting: Setting, mesh) -> float:
    groups = step_groups(imp, structure, setting.optimizer)
    shapes = {name: state for name, state in state_shapes(imp).items() if name in groups}
    with jax.set_mesh(mesh):
        traced = jax.make_jaxpr(make_step(imp, structure, setting.optimizer))(
            shapes, structure.batch_shapes(), jax.ShapeDtypeStruct((), jnp.float32)
        )
    return traced_flops(traced)


def _gathers_tokens(collectives: dict[str, list[float]], structure: Structure, setting: Setting) -> bool:
    """Whether gathered bytes can be those of tokens: more than all parameters and features a device gathers."""
    gathered = collectives.get("all-gather", [0, 0])[1]
    weights = sum(x.size for x in jax.tree.leaves(Imp.for_structures(setting.config, [structure]).shapes()))
    passes = 3 * len(structure.inputs)
    features = 16 * structure.global_batch_size * setting.config.width * len(structure.inputs)
    return gathered > passes * 4 * weights + features


def _too_large(setting: Setting, structure: Structure, utilization: float, error: Exception) -> StepPlan:
    """A structure that the compiler refuses for its memory. Raises the error again if that is not the reason."""
    found = _OUT_OF_MEMORY.search(str(error))
    if found is None and "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    plan = _by_arithmetic(setting, structure, utilization)
    peak = int(float(found[1]) * _UNITS[found[2]]) if found else plan.memory["peak"]
    text = f"needs {found[1]} {found[2]}iB of {found[3]} {found[4]}iB" if found else one_line(error, limit=200)
    return dataclasses.replace(plan, source="compiler", memory=plan.memory | {"peak": peak}, problem=text)


def _by_arithmetic(setting: Setting, structure: Structure, utilization: float) -> StepPlan:
    """Without a compiler: ``sizes.structure_memory``, and FLOPs at the stated utilization."""
    machine, config = setting.machine, setting.config
    if structure.global_batch_size % machine.num_devices:
        raise RequestError(
            f"a batch of {structure.global_batch_size} samples cannot be shared by {machine.num_devices} devices in "
            "equal parts"
        )
    parts = sizes.structure_memory(config, structure, fused=config.dtype == "bfloat16")
    shared = machine.num_devices
    state = parts["state"] // (shared if setting.fsdp else 1)
    gradients = parts["gradients"] // (shared if setting.fsdp else 1)
    activations, batch = parts["activations"] // shared, parts["batch"] // shared
    flops = sizes.structure_flops(config, structure)
    return StepPlan(
        source="arithmetic",
        memory={"peak": state + gradients + activations + batch, "state": state, "batch": batch, "program": 0},
        step_s=flops / (_rate(setting, utilization) * shared),
        link_s=0.0,
        flops=flops,
        traced_flops=flops,
        cycles=0.0,
        scopes={},
        collectives={},
        tokens_gathered=False,
        compile_s=0.0,
    )
