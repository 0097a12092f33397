"""The workers and decoding of a run as plain data: ``cluster.*`` of the recipe. Knows nothing of Ray."""

from __future__ import annotations

import dataclasses
import math
import os

from pipeline.cluster.settings import WorkerSettings
from pipeline.data.spec import DecodeLimits


@dataclasses.dataclass(frozen=True)
class DecodeOptions:
    """Options of the streams.

    mode: "tasks", "actors" or "auto". block_steps: steps of the run that a block lasts for. ahead: share of the object
    store for blocks that are decoded ahead of training. cpus: minimum and maximum of all ranks together; None leaves
    both to the cluster.
    """

    mode: str = "auto"
    block_steps: int = 16
    ahead: float = 0.3
    cpus: tuple[int, int] | None = None

    @property
    def cpu_bounds(self) -> tuple[float, float]:
        """Minimum and maximum CPUs of all ranks together."""
        return self.cpus or (1, math.inf)


@dataclasses.dataclass(frozen=True)
class Cluster(WorkerSettings):
    """The workers of a run, and the decoding of their data."""

    decode: DecodeOptions = dataclasses.field(default_factory=DecodeOptions)
    cache_bytes: int = 0
    limits: DecodeLimits = dataclasses.field(default_factory=DecodeLimits)

    @property
    def elastic(self) -> bool:
        return isinstance(self.num_workers, tuple)

    @property
    def sizes(self) -> range:
        """The numbers of workers that the run may have."""
        low, high = self.num_workers if self.elastic else (self.num_workers, self.num_workers)
        return range(low, high + 1)

    @property
    def worker_resources(self) -> dict[str, float]:
        """The resources of its machine that one worker takes."""
        resources = {"CPU": self.cpus_per_worker}
        if self.accelerator != "cpu":
            resources[self.accelerator.upper()] = self.accelerators_per_worker
        return resources

    def trainer_cpus(self, num_workers: int | None = None) -> float:
        """CPUs that ``num_workers`` workers take; None: the maximum number of them."""
        return (self.sizes[-1] if num_workers is None else num_workers) * self.cpus_per_worker

    @property
    def joins(self) -> str | None:
        """The address of the cluster that the run joins; None if it starts its own Ray."""
        address = self.address or os.environ.get("RAY_ADDRESS")
        return None if address == "local" else address or None
