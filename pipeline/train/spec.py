"""A whole run as plain data."""

from __future__ import annotations

import dataclasses

from model.config import ModelConfig, OptimizerConfig
from pipeline.data.run_data import DataSpec
from pipeline.errors import RequestError
from pipeline.store.path import run_path
from pipeline.train.checkpoint import Checkpoints
from pipeline.train.memory_fit import run_need
from pipeline.train.memory_need import Need
from pipeline.train.mixture.schedule import START, MixtureSpec, Position, Schedule
from pipeline.train.reject_limit import RejectCounts
from pipeline.train.telemetry.spec import LoggingSpec


@dataclasses.dataclass(frozen=True)
class CheckpointSpec:
    """When the state is saved, which checkpoints are kept, and the source of a new run's parameters.

    every: steps between two saves. keep_last, keep_every: as ``checkpoint.Checkpoints``. keep_best: the metric whose
    best checkpoint is kept too. init_from: the directory of another run or of an exported model; init_step: the step
    of its parameters, None if the run goes on from its own.
    """

    every: int
    keep_last: int
    keep_every: int | None
    keep_best: str | None
    init_from: str | None
    init_step: int | None


@dataclasses.dataclass(frozen=True)
class PlacementSpec:
    """The use of a run's devices. expert_parallel, fsdp: the layout of parameters (``model.sharding``).

    deterministic: the same bits in every run on GPUs too (``step.compile_step``). compile_cache: the folder of compiled
    steps. stall_timeout_s: seconds without progress before the run ends.
    """

    expert_parallel: int
    fsdp: bool
    deterministic: bool
    compile_cache: str | None
    stall_timeout_s: float


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """A whole run as plain data; ``plan.plan`` makes it from a recipe. Travels to workers.

    run_dir: empty in the plan of a recipe that is only checked. recipe: resolved, without the credentials of its URIs,
    stored in the run directory and in checkpoints.
    """

    run_dir: str
    recipe: dict
    data: DataSpec
    model: ModelConfig
    optimizer: OptimizerConfig
    mixture: MixtureSpec
    checkpoints: CheckpointSpec
    placement: PlacementSpec
    logging: LoggingSpec

    def open_checkpoints(self) -> Checkpoints:
        """The checkpoints of the run directory."""
        if not self.run_dir:
            raise ValueError("this plan has no run directory")
        keep = self.checkpoints
        return Checkpoints(run_path(self.run_dir), keep_last=keep.keep_last, keep_every=keep.keep_every)

    def position(self, step: int | None = None) -> Position:
        """The position stored in the checkpoint of a step, by default the newest; ``START`` without a checkpoint.

        Raises RequestError if the rows of a data set have changed since.
        """
        checkpoints = self.open_checkpoints()
        step = checkpoints.latest_step if step is None else step
        if not step:
            return START
        data = checkpoints.data(step)
        for name, now in self.data.fingerprints.items():
            if fault := _other_rows(data["fingerprints"].get(name, now), now):
                raise RequestError(
                    f"data_sets.{name}: {fault}, and the order of samples and what they teach depend on it; put the "
                    "old rows back, or put the new ones into another data set"
                )
        return Position(**data["position"])

    def reject_counts(self, step: int) -> RejectCounts:
        """The draws and rejects before a step, as its checkpoint holds them."""
        stored = self.open_checkpoints().data(step).get("rejects", {}) if step else {}
        return RejectCounts({name: d.max_reject_fraction for name, d in self.data.data_sets.items()}, stored)

    def schedule(self, position: Position) -> Schedule:
        """The run from a position to its end."""
        return Schedule(self.data, self.mixture, position)

    def need(self, schedule: Schedule, config: ModelConfig) -> Need:
        """The memory that a schedule needs of the devices of this process. config: with the type they compute in."""
        placement = self.placement
        return run_need(
            config,
            schedule,
            expert_parallel=placement.expert_parallel,
            fsdp=placement.fsdp,
            freeze=self.optimizer.freeze,
        )


def _other_rows(then: dict, now: dict) -> str | None:
    """The difference between the fingerprints of a data set when the run began and now, in words."""
    if then["num_rows"] != now["num_rows"]:
        return f"the run began with {then['num_rows']} rows, the manifest now has {now['num_rows']}"
    if then.get("substitutes") != now.get("substitutes"):
        return "the run was begun by another version of the program, which takes other substitutes for bad samples"
    differ = [name for name in then if then[name] != now.get(name)]
    if not differ:
        return None
    return f"the rows are not those that the run began with: {', '.join(differ)} differ, or come in another order"
