"""The number of workers, as Ray Train is told it."""

from __future__ import annotations

import dataclasses

from ray.train.v2.api.config import ScalingConfig

from pipeline.cluster.capacity import max_workers, may_grow
from pipeline.cluster.spec import Cluster


@dataclasses.dataclass
class _Capped(ScalingConfig):
    """An elastic size that leaves a CPU to decode with: streams would wait for one without a bound.

    Ray's elastic policy reads ``max_workers`` before each change of size, so the cap follows machines that come or go.
    """

    cluster: Cluster | None = None

    @property
    def max_workers(self) -> int:
        return max_workers(self.cluster)


def scaling_config(cluster: Cluster) -> ScalingConfig:
    """Sizes and resources of the workers. Ray must have started."""
    values = {
        "num_workers": cluster.num_workers,
        "use_gpu": cluster.accelerator == "gpu",
        "resources_per_worker": cluster.worker_resources,
    }
    if cluster.accelerator == "tpu":
        values |= {"use_tpu": True, "topology": cluster.topology, "accelerator_type": cluster.accelerator_type}
    # An autoscaler brings machines to decode on, and learns from the request for workers which to bring. A Ray that the
    # run itself has started has none.
    capped = cluster.elastic and not (cluster.joins and may_grow())
    return _Capped(**values, cluster=cluster) if capped else ScalingConfig(**values)
