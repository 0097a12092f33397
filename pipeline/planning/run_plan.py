"""The plan of a whole run: what its steps add up to on a machine, and what keeps it from running there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from model import sizes
from model.config import NO_VOCABULARY
from model.imp import Imp
from model.step import state_shapes
from model.structure import Structure
from pipeline.data.run_data import DataSpec
from pipeline.data.spec import DataSetSpec
from pipeline.planning.hardware import Machine
from pipeline.planning.structures import Setting, StepPlan, step_plan
from pipeline.recipe import Recipe, specs
from pipeline.train.mixture.schedule import MixtureSpec, Schedule

# Share of a device's memory that a plan leaves free.
MARGIN = 0.1
# Batches that lie on a device at a time: the one in use and those put there ahead.
_BATCHES = 3
# Rows of a data set whose recipe and manifest do not tell.
_ROWS = 1_000_000_000
# Seconds of CPU to decode one sample, of benchmarks/decode.py and docs/benchmarks.md: a photograph of 640 x 480 pixels,
# a film of 16 frames at 256 pixels, ten seconds of sound.
_DECODE_S = {"image": 0.005, "video": 0.11, "audio": 0.03}


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What a plan cannot know.

    utilization: share of the peak where no compiler says more. hours_between_failures: of the whole machine.
    write_bytes_s: rate of one host to the checkpoints' storage. restart_s: from a failure to the next step.
    devices_per_host: devices that share a host.
    """

    utilization: float = 0.4
    hours_between_failures: float = 24.0
    write_bytes_s: float = 1e9
    restart_s: float = 120.0
    devices_per_host: int = 8


@dataclasses.dataclass(frozen=True)
class TaskStep:
    """One (task, variant). share: of the run's steps."""

    task: str
    variant: str
    structure: Structure
    share: float
    plan: StepPlan | None


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """All that a plan says. days: of the machine. Steps that were not planned take the time of their FLOPs at the
    utilization of those that were."""

    machine: Machine
    num_steps: int
    steps: list[TaskStep]
    utilization: float
    days: float
    flops: float
    traced_over_analytic: float
    peak_bytes: int
    resident_bytes: int
    fits: bool
    advice: str | None
    decode_cpus: float
    input_bytes_s: float
    checkpoint_bytes: int
    save_s: float
    save_every_s: float
    goodput: float

    @property
    def device_days(self) -> float:
        """Days of one device."""
        return self.days * self.machine.num_devices

    @property
    def price(self) -> float | None:
        """US dollars at the table's price."""
        hour = self.machine.device.price
        return None if hour is None else 24 * self.device_days * hour


def run_schedule(recipe: Recipe) -> Schedule:
    """The steps of a recipe without its data: rows as the recipe's ``plan`` keys say."""
    data_sets = specs.data_set_specs(recipe)
    data = DataSpec(
        tasks=specs.task_specs(recipe),
        data_sets={name: _with_classes(recipe, d) for name, d in data_sets.items()},
        tokens=specs.token_spec(recipe),
        fingerprints={name: {"num_rows": recipe.data_sets[name].plan.rows or _ROWS} for name in data_sets},
    )
    return Schedule(data, MixtureSpec(recipe.seed, recipe.train.num_steps, specs.sampler_spec(recipe)))


def _with_classes(recipe: Recipe, data_set: DataSetSpec) -> DataSetSpec:
    count = recipe.data_sets[data_set.name].plan.classes
    if not count:
        return data_set
    return dataclasses.replace(data_set, classes=tuple(f"class {number}" for number in range(count)))


def setting_of(recipe: Recipe, machine: Machine) -> Setting:
    """The programs' settings on a machine, "auto" types resolved for it."""
    texts = any("text" in task.modalities for task in recipe.tasks.values())
    config = specs.model_config(recipe, vocab_size=recipe.text.vocab_size if texts else NO_VOCABULARY)
    if config.dtype == "auto":
        config = dataclasses.replace(config, dtype="float32" if machine.platform == "cpu" else "bfloat16")
    return Setting(
        config=config,
        optimizer=specs.optimizer_config(recipe),
        machine=machine,
        expert_parallel=recipe.cluster.expert_parallel,
        fsdp=recipe.cluster.fsdp,
        deterministic=recipe.train.deterministic,
    )


def chosen(schedule: Schedule, setting: Setting, *, every: bool) -> list[Structure]:
    """The structures to plan: all, or the one of each modality that needs most memory."""
    structures = list(dict.fromkeys(schedule.structures.values()))
    if every:
        return structures
    memory = {s: sum(sizes.structure_memory(setting.config, s).values()) for s in structures}
    modalities = dict.fromkeys(i.modality for s in structures for i in s.inputs)
    largest = [
        max((s for s in structures if any(i.modality == m for i in s.inputs)), key=lambda s: memory[s])
        for m in modalities
    ]
    return list(dict.fromkeys(largest))


def plan_structures(
    setting: Setting, structures: list[Structure], assumptions: Assumptions, *, cache: Path | None
) -> Iterator[tuple[Structure, StepPlan]]:
    """Plans one structure after another."""
    for structure in structures:
        yield structure, step_plan(setting, structure, utilization=assumptions.utilization, cache=cache)


def run_plan(
    setting: Setting, schedule: Schedule, plans: dict[Structure, StepPlan], assumptions: Assumptions
) -> RunPlan:
    """Adds the steps up. plans: of some of the structures, at least one."""
    machine = setting.machine
    rate = sum(p.flops for p in plans.values()) / sum(p.step_s for p in plans.values())
    steps, seconds, flops = [], 0.0, 0.0
    for (task, variant), structure in schedule.structures.items():
        share = schedule.share(task) / len(schedule.tasks[task].variants)
        plan = plans.get(structure)
        step_flops = sizes.structure_flops(setting.config, structure)
        seconds += schedule.num_steps * share * (plan.step_s if plan else step_flops / rate)
        flops += schedule.num_steps * share * step_flops
        steps.append(TaskStep(task, variant, structure, share, plan))
    imp = Imp.for_structures(setting.config, schedule.model_structures)
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state_shapes(imp)))
    resident = _resident(setting, schedule, imp, plans)
    peak = max(p.memory["peak"] - p.memory["state"] - p.memory["program"] for p in plans.values()) + resident
    problems = [p for p in plans.values() if p.problem]
    fits = not problems and peak <= (1 - MARGIN) * machine.device.memory_bytes
    hosts = 1 if machine.here else math.ceil(machine.num_devices / assumptions.devices_per_host)
    save_s = state / hosts / assumptions.write_bytes_s
    between = 3600 * assumptions.hours_between_failures
    # Young's interval between saves that cost save_s each.
    every_s = math.sqrt(2 * save_s * between)
    lost = save_s / every_s + (every_s / 2 + assumptions.restart_s) / between
    mean_s = seconds / schedule.num_steps
    peak_flops = machine.device.peak_flops
    return RunPlan(
        machine=machine,
        num_steps=schedule.num_steps,
        steps=steps,
        utilization=flops / seconds / (peak_flops * machine.num_devices) if peak_flops else math.nan,
        days=seconds / 86400,
        flops=flops,
        traced_over_analytic=sum(p.traced_flops for p in plans.values()) / sum(p.flops for p in plans.values()),
        peak_bytes=peak,
        resident_bytes=resident,
        fits=fits,
        advice=None if fits else _advice(setting, schedule),
        decode_cpus=_per_step(steps, _decode_s) / mean_s,
        input_bytes_s=_per_step(steps, lambda t, s: float(_batch_bytes(s))) / mean_s,
        checkpoint_bytes=state,
        save_s=save_s,
        save_every_s=every_s,
        goodput=max(0.0, 1 - lost),
    )


def _resident(setting: Setting, schedule: Schedule, imp: Imp, plans: dict[Structure, StepPlan]) -> int:
    """Bytes of a device that stay from step to step: the state of all groups, programs, batches that wait."""
    devices = setting.machine.num_devices
    shapes = state_shapes(imp)
    experts, others = 0, 0
    for path, leaf in jax.tree.leaves_with_path(shapes):
        size = leaf.size * leaf.dtype.itemsize
        if any(getattr(key, "key", None) == "experts" for key in path):
            experts += size
        else:
            others += size
    data = devices // setting.expert_parallel if setting.fsdp else 1
    state = experts // (setting.expert_parallel * data) + others // data
    structures = set(schedule.structures.values())
    program = max(p.memory["program"] for p in plans.values()) * len(structures)
    return state + program + _BATCHES * max(_batch_bytes(s) for s in structures) // devices


def _batch_bytes(structure: Structure) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(structure.batch_shapes()))


def _per_step(steps: list[TaskStep], of: Callable[[TaskStep, Structure], float]) -> float:
    """The mean of a step."""
    return sum(step.share * of(step, step.structure) for step in steps)


def _decode_s(step: TaskStep, structure: Structure) -> float:
    names = {i.modality for i in structure.inputs}
    video = any(i.modality == "vision" and i.num_values > 3 * 256 for i in structure.inputs)
    kinds = [("video" if video else "image") if name == "vision" else name for name in names]
    return structure.global_batch_size * sum(_DECODE_S.get(kind, 0.0) for kind in kinds)


def _advice(setting: Setting, schedule: Schedule) -> str:
    """The first setting that lowers memory and is not set yet, in words."""
    config, machine = setting.config, setting.machine
    if machine.num_devices > 1 and not setting.fsdp:
        return "cluster.fsdp: true lays parameters and moments over the devices"
    if config.remat != "full":
        return "model.remat: full keeps less for the backward pass"
    experts = config.moe.num_experts if config.moe else 1
    wider = [n for n in range(setting.expert_parallel + 1, experts + 1) if experts % n == 0 == machine.num_devices % n]
    if wider:
        return f"cluster.expert_parallel: {wider[0]} lays the experts over more devices"
    largest = max(s.global_batch_size for s in schedule.structures.values())
    return f"half the batch ({largest // 2} samples), or twice the devices"
