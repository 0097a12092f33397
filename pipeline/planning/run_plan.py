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
from pipeline.data.spec import DataSetSpec, TaskSpec
from pipeline.planning.hardware import Machine
from pipeline.planning.structures import Setting, StepPlan, step_plan
from pipeline.recipe import Recipe, specs
from pipeline.train.devices import use_compute_type
from pipeline.train.memory_fit import MARGIN, advice
from pipeline.train.memory_need import BATCHES, Layout, Need, at_least, batch_bytes, estimated_parts, whole_parts
from pipeline.train.mixture.schedule import MixtureSpec, Schedule

# One device that holds all of a batch.
ALONE = Layout(1)
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
    """

    utilization: float = 0.4
    hours_between_failures: float = 24.0
    write_bytes_s: float = 1e9
    restart_s: float = 120.0


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
    """All that a plan says.

    days: of the machine. memory: bytes of a device by part, whose sum is peak_bytes. Steps that were not planned take
    the time of their FLOPs at the utilization of those that were.
    """

    machine: Machine
    num_steps: int
    steps: list[TaskStep]
    utilization: float
    days: float
    flops: float
    traced_over_analytic: float
    memory: dict[str, int]
    peak_bytes: int
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
    config = use_compute_type(config, machine.platform)
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
    memory = {s: sum(whole_parts(setting.config, s).values()) for s in structures}
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
    config = at_least(setting.config, machine.platform)
    need = Need(config, tuple(dict.fromkeys(schedule.structures.values())), setting.layout)
    memory = _memory(need, plans)
    peak = sum(memory.values())
    problems = [p for p in plans.values() if p.problem]
    limit = machine.device.memory_bytes
    # A device whose memory is unknown (0) refuses nothing.
    fits = not problems and (not limit or peak <= (1 - MARGIN) * limit)
    save_s = state / machine.num_hosts / assumptions.write_bytes_s
    between_s = 3600 * assumptions.hours_between_failures
    every_s = save_interval_s(save_s, between_s)
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
        memory=memory,
        peak_bytes=peak,
        fits=fits,
        advice=None if fits else advice(dataclasses.replace(need, work=_work(need, plans)), limit),
        decode_cpus=_per_step(steps, lambda step: _decode_s(schedule.tasks[step.task], step.structure)) / mean_s,
        input_bytes_s=_per_step(steps, lambda step: float(batch_bytes(step.structure, ALONE))) / mean_s,
        checkpoint_bytes=state,
        save_s=save_s,
        save_every_s=every_s,
        goodput=goodput(save_s, every_s, restart_s=assumptions.restart_s, between_s=between_s),
    )


def _memory(need: Need, plans: dict[Structure, StepPlan]) -> dict[str, int]:
    """Bytes of a device by part: the state of all groups, all programs, batches that wait, and the largest step's."""
    largest = max((p.memory for p in plans.values()), key=lambda m: m["gradients"] + m["activations"])
    return {
        "state": need.state(),
        "gradients": largest["gradients"],
        "activations": largest["activations"],
        "batch": BATCHES * max(batch_bytes(s, need.layout) for s in need.structures),
        "program": max(p.memory["program"] for p in plans.values()) * len(need.structures),
    }


def _work(need: Need, plans: dict[Structure, StepPlan]) -> float:
    """Factor of the planned activations over those of arithmetic, by which other settings are judged."""
    factors = [
        plan.memory["activations"] / max(1, estimated_parts(need.config, structure, need.layout)["activations"])
        for structure, plan in plans.items()
        if plan.source == "compiler"
    ]
    return max(factors, default=1.0)


def _per_step(steps: list[TaskStep], of: Callable[[TaskStep], float]) -> float:
    """The mean of a step."""
    return sum(step.share * of(step) for step in steps)


def _decode_s(task: TaskSpec, structure: Structure) -> float:
    """Seconds of CPU to decode a batch of a task."""
    return structure.global_batch_size * sum(_DECODE_S.get(name, 0.0) for name in task.modalities)


def save_interval_s(save_s: float, between_s: float) -> float:
    """Young's interval between saves that cost ``save_s`` each, at a failure every ``between_s``."""
    return math.sqrt(2 * save_s * between_s)


def goodput(save_s: float, every_s: float, *, restart_s: float, between_s: float) -> float:
    """Share of a run's time that is neither saves nor, after failures, work done again and restarts."""
    return max(0.0, 1 - save_s / every_s - (every_s / 2 + restart_s) / between_s)
