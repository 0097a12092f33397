"""The parts of a run's plain data: which samples, in which mixture, saved how often, laid out how."""

from __future__ import annotations

import dataclasses

from pipeline.data.spec import DataSetSpec, TaskSpec, TokenSpec
from pipeline.train.mixture.samplers import SamplerSpec


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """The data of a run, and how they become tokens.

    fingerprints: data set → digests of its training rows (``data.columns.Fingerprint.digests``). tokenizer: its bytes,
    None where no task reads text.
    """

    tasks: dict[str, TaskSpec]
    data_sets: dict[str, DataSetSpec]
    tokens: TokenSpec
    fingerprints: dict[str, dict]
    tokenizer: bytes | None = None

    @property
    def num_rows(self) -> dict[str, int]:
        """Data set → rows of its training manifest."""
        return {name: fingerprint["num_rows"] for name, fingerprint in self.fingerprints.items()}


@dataclasses.dataclass(frozen=True)
class MixtureSpec:
    """Which task each step runs. seed: of the order of samples and of the initial parameters too."""

    seed: int
    num_steps: int
    sampler: SamplerSpec = dataclasses.field(default_factory=SamplerSpec)


@dataclasses.dataclass(frozen=True)
class CheckpointSpec:
    """When the state is saved, which checkpoints are kept, and the source of a new run's parameters.

    every: steps between two saves. keep_last, keep_every: as ``checkpoint.Checkpoints``. init_from: the directory of
    another run; init_step: the step of its checkpoint, None where the run goes on from one of its own.
    """

    every: int
    keep_last: int
    keep_every: int | None
    init_from: str | None
    init_step: int | None


@dataclasses.dataclass(frozen=True)
class PlacementSpec:
    """How a run uses its devices. expert_parallel, fsdp: the layout of parameters (``model.sharding``).

    compile_cache: the folder of compiled steps. stall_timeout_s: seconds without progress before the run ends.
    """

    expert_parallel: int
    fsdp: bool
    compile_cache: str | None
    stall_timeout_s: float
