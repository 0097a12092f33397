"""The keys of ``cluster.*`` that this room uses as they are. Knows nothing of Ray."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from annotated_types import Ge

from pipeline.keys import FromOne, key
from pipeline.stopping import LIMIT_S


@dataclasses.dataclass(frozen=True)
class WorkerSettings:
    """The workers of a run and the machines that they need."""

    num_workers: Annotated[int, Ge(0)] | tuple[FromOne, FromOne] = key(
        0,
        "0 trains in the driver's process; N starts N Ray Train workers, one a host with all its devices; [min, max] "
        "starts as many as fit, and changes their number as machines leave or join.",
    )
    max_failures: int = key(
        10, "Maximum number of restarts after workers were lost; preempted machines do not count.", ge=0
    )
    stall_timeout_s: float = key(
        900.0, "Seconds without progress after which a worker ends and leaves its stacks.", gt=0
    )
    stop_timeout_s: float = key(
        LIMIT_S, "Seconds from a stop to the end of the run, which by then has ended its step and saved, or not.", gt=0
    )
    accelerator: Literal["cpu", "gpu", "tpu"] = key("cpu", "Kind of device that a worker trains on.")
    accelerators_per_worker: int = key(1, "Devices of each worker, all those of its host.", ge=0)
    cpus_per_worker: float = key(1.0, "CPUs that each worker takes beside those that decode.", ge=0)
    topology: str | None = key(None, "Slice of TPUs that the workers make up, such as 4x4.")
    accelerator_type: str | None = key(None, "Ray's name of the kind of TPU, such as TPU-V5P.")
    address: str | None = key(None, "Address of a running Ray to join; null starts one on this machine.")
    start_timeout_s: float = key(1800.0, "Seconds to wait for the first workers' machines.", gt=0)
