"""A whole run as plain data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from model.config import ModelConfig, OptimizerConfig
from pipeline.data.spec import DataSetSpec, TaskSpec, TokenSpec
from pipeline.errors import RequestError
from pipeline.train.checkpoint import Checkpoints
from pipeline.train.mixture.samplers import SamplerSpec
from pipeline.train.mixture.schedule import START, Position, Schedule
from pipeline.train.telemetry.spec import LoggingSpec


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """A whole run as plain data; ``prepare.prepare`` makes it from a recipe. Travels to workers.

    fingerprints: data set → what its training rows are (``data.columns.Fingerprint.digests``). config: the resolved
    recipe, stored in checkpoints.
    expert_parallel, fsdp: how parameters lie over the devices (``model.sharding``). init_step: of the checkpoint of
    ``init_from`` that a new run begins with.
    """

    run_dir: str
    config: dict
    tasks: dict[str, TaskSpec]
    data_sets: dict[str, DataSetSpec]
    tokens: TokenSpec
    fingerprints: dict[str, dict]
    tokenizer: bytes | None
    model: ModelConfig
    optimizer: OptimizerConfig
    seed: int
    num_steps: int
    checkpoint_every: int
    keep_last: int
    keep_every: int | None
    logging: LoggingSpec
    compile_cache: str | None
    expert_parallel: int
    fsdp: bool
    sampler: SamplerSpec
    stall_timeout_s: float
    init_from: str | None
    init_step: int | None

    def checkpoints(self) -> Checkpoints:
        return Checkpoints(Path(self.run_dir), keep_last=self.keep_last, keep_every=self.keep_every)

    def position(self, step: int | None = None) -> Position:
        """Where the checkpoint of a step stands, or the newest; the start of the run where there is none.

        Raises RequestError where a data set has other rows than then.
        """
        checkpoints = self.checkpoints()
        step = checkpoints.latest_step if step is None else step
        if not step:
            return START
        data = checkpoints.data(step)
        for name, now in self.fingerprints.items():
            if fault := _other_rows(data["fingerprints"].get(name, now), now):
                raise RequestError(
                    f"data_sets.{name}: {fault}, and the order of samples and what they teach depend on it; put the "
                    "old rows back, or give the new ones a data set of their own"
                )
        return Position(**data["position"])

    @property
    def num_rows(self) -> dict[str, int]:
        """Data set → rows of its training manifest."""
        return {name: fingerprint["num_rows"] for name, fingerprint in self.fingerprints.items()}

    def schedule(self, position: Position) -> Schedule:
        """The run from a position to its end."""
        return Schedule(
            self.tasks,
            self.data_sets,
            num_rows=self.num_rows,
            tokens=self.tokens,
            seed=self.seed,
            num_steps=self.num_steps,
            sampler=self.sampler,
            position=position,
        )


def _other_rows(then: dict, now: dict) -> str | None:
    """The difference between the fingerprints of a data set when the run began and now, in words."""
    if then["num_rows"] != now["num_rows"]:
        return f"the run began with {then['num_rows']} rows, the manifest now has {now['num_rows']}"
    differ = [name for name in then if then[name] != now.get(name)]
    if not differ:
        return None
    return f"the rows are not those that the run began with: {', '.join(differ)} differ, or come in another order"
