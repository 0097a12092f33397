"""Checks that the machines of a run can hold its workers, before anything waits for them."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import ray

from pipeline.cluster import ray_private
from pipeline.cluster.decode_demand import DecodeDemand
from pipeline.cluster.spec import Cluster, DecodeOptions
from pipeline.errors import RequestError
from pipeline.host_memory import machine_cpus, used_share
from pipeline.waiting import waiting_for

# Minimum CPUs of a cluster whose streams keep actors.
_ACTOR_CPUS = 8
# Seconds between two requests for the workers' machines, until Ray Train asks for them itself.
_ASK_EVERY_S = 20.0
# Share of a machine's memory that is named as a reason to wait.
_FULL = 0.93
# Seconds for which a count of the cluster's CPUs holds.
_LOOK_EVERY_S = 5.0
# Device files: NVIDIA, NVIDIA under WSL, AMD; TPUs up to v4 and later ones.
_DEVICE_FILES = {"gpu": ("nvidia[0-9]*", "dxg", "kfd"), "tpu": ("accel*", "vfio/[0-9]*")}


def cluster_cpus() -> float:
    """CPUs of all machines."""
    return ray.cluster_resources().get("CPU", 1.0)


def spare_cpus() -> list[float]:
    """CPUs of each machine beside those that the workers of all jobs have reserved."""
    reserved: Counter[str] = Counter()
    for group in ray.util.placement_group_table().values():
        if group["state"] != "REMOVED":
            for number, node in group["bundles_to_node_id"].items():
                reserved[node] += group["bundles"][number].get("CPU", 0.0)
    machines = [(node["Resources"].get("CPU", 0.0), node["NodeID"]) for node in ray.nodes() if node["Alive"]]
    return [max(0.0, cpus - reserved[node]) for cpus, node in machines]


def part_that_fits(spare: Iterable[float], decoders: int) -> float:
    """CPUs for each of ``decoders``, at most one, so that machines with these spare CPUs hold all at once.

    0 if no machine has any to spare: then a part of any size has to wait.
    """
    spare = [cpus for cpus in spare if cpus > 0]
    if not spare:
        return 0.0
    part = 1.0
    while sum(held := [int(cpus / part + 1e-9) for cpus in spare]) < decoders:
        # The next smaller part of which a machine holds one more.
        part = max(cpus / (number + 1) for cpus, number in zip(spare, held, strict=True))
    # Ray counts in ten-thousandths.
    return math.floor(part * 1e4) / 1e4


def uses_actors(options: DecodeOptions) -> bool:
    """Whether each stream decodes in its own actors, not in pooled tasks."""
    return options.mode == "actors" or (options.mode == "auto" and cluster_cpus() >= _ACTOR_CPUS)


def lacking_decode_cpu() -> str | None:
    """The CPU that this process's decoders wait for, in words; None if a machine has one, and while an actor decodes.

    Actors that have started keep their CPUs, and none is free while they wait for work.
    """
    # Ray Data takes a second to load; who waits for decoders has loaded it.
    from pipeline.cluster.ray_input import living_actors

    needed = part_that_fits(spare_cpus(), 1) or 1.0
    if living_actors() or max(ray_private.free_cpus(), default=0.0) >= needed:
        return None
    return f"a free CPU to decode with; others use the {cluster_cpus():g} of the cluster"


class DecodeCpus:
    """CPUs that decode for one rank of ``world_size``, on the machines of the moment.

    each: CPUs of one decoder. demand: the CPUs that the rank asks an autoscaler for; None without one.
    """

    def __init__(self, cluster: Cluster, world_size: int):
        self._trainer_cpus = cluster.trainer_cpus(world_size if cluster.num_workers else 0)
        self._actors = uses_actors(cluster.decode)
        self._world_size = world_size
        low, self._max_cpus = (bound / world_size for bound in cluster.decode.cpu_bounds)
        self._looked_at = -_LOOK_EVERY_S
        self.look()
        self.demand = DecodeDemand(low, self._max_cpus, self._decoders_here) if autoscales() else None
        self.each = self._each()

    def _each(self) -> float:
        """At most one, and no more than lets some decoder start on the machines of the moment.

        Those of actors keep their CPUs, so all ranks' must fit beside one another; tasks take turns.
        """
        spare = spare_cpus()
        if not self._actors:
            return part_that_fits(spare, 1) or 1.0
        # Other jobs' workers leave less than was counted.
        decoders = min(self.num_decoders, max(1, math.ceil(sum(spare) / self._world_size - 1e-6)))
        return min(part_that_fits(spare, self._world_size * decoders), self.cpus / self.num_decoders)

    def look(self) -> None:
        """Counts the CPUs, unless that was done a moment ago."""
        if time.monotonic() - self._looked_at >= _LOOK_EVERY_S:
            self._looked_at = time.monotonic()
            free = max(0.0, cluster_cpus() - self._trainer_cpus) / self._world_size
            self.cpus = min(free, self._max_cpus)

    def _decoders_here(self) -> int:
        return max(1, math.ceil(self.cpus - 1e-6))

    @property
    def num_decoders(self) -> int:
        """Decoders that keep the CPUs busy, the last of them with a part of one; at least one.

        No more than is asked for, so that machines which are not needed become idle and go.
        """
        self.look()
        here = self._decoders_here()
        return min(here, self.demand.cpus) if self.demand else here

    def max_unfinished(self) -> int:
        """Number of blocks that decoders may have."""
        if self._actors:
            # A block waits while each of them decodes one.
            return 2 * self.num_decoders
        # Among ranks that share CPUs, one that queued more would keep the others waiting.
        return self.num_decoders + (self._world_size == 1)

    def note(self, unfinished: int, *, waits: bool) -> None:
        """Notes how busy the decoders are, and whether training waits for them."""
        if self.demand:
            self.demand.note(unfinished, waits=waits)

    def lack(self) -> str:
        """The CPUs that no one uses and memory that is short, in words, for a line on blocks that are not decoded."""
        free = f"{ray.available_resources().get('CPU', 0.0):g} of the cluster's {cluster_cpus():g} CPUs are free"
        if (used := used_share()) < _FULL:
            return free
        # Ray starts a task again that it has ended, and says so in its own words alone.
        return f"{free}; {used:.0%} of this machine's memory is taken, and above 95% Ray ends decoders again and again"

    def wanted(self) -> int:
        """CPUs to ask an autoscaler for; 0 without one."""
        return self.demand.cpus if self.demand else 0


def bytes_ahead(cluster: Cluster, world_size: int, *, ranks_here: int = 1) -> int:
    """Bytes of blocks that one rank may have ahead: its part of the object store of its machine, or of all machines.

    ranks_here: ranks on this machine, between which its store is divided.
    """
    here = ray.get_runtime_context().get_node_id()
    stores = {n["NodeID"]: n["Resources"].get("object_store_memory", 0.0) for n in ray.nodes() if n["Alive"]}
    return int(cluster.decode.ahead * min(stores.get(here, 0.0) / ranks_here, sum(stores.values()) / world_size))


def check_machine(cluster: Cluster) -> None:
    """Raises RequestError if this machine alone cannot hold the workers."""
    minimum, cpus = cluster.sizes[0], machine_cpus()
    if minimum * cluster.cpus_per_worker > cpus:
        raise RequestError(
            f"cluster.num_workers = {minimum}: workers of {cluster.cpus_per_worker:g} CPUs each need "
            f"{minimum * cluster.cpus_per_worker:g}, this machine has {cpus}; ask for fewer, join a cluster "
            "(cluster.address), or lower cluster.cpus_per_worker so that they share CPUs"
        )


def check_accelerator(cluster: Cluster) -> None:
    """Raises RequestError if a run on this machine asks for an accelerator that the machine lacks.

    Looks only at device files: the libraries may hang if a device is broken or in use.
    """
    if cluster.joins or cluster.accelerator == "cpu":
        return
    patterns = _DEVICE_FILES[cluster.accelerator]
    if not any(True for pattern in patterns for _ in Path("/dev").glob(pattern)):
        raise RequestError(
            f"cluster.accelerator: {cluster.accelerator}: this machine has none (no /dev/{', /dev/'.join(patterns)}); "
            "leave the key out to train on CPUs, or join a cluster that has one (cluster.address)"
        )


def await_room(cluster: Cluster) -> None:
    """Waits until the machines of a cluster that the run has joined can hold the workers, and decode beside them.

    Raises RequestError if they cannot within ``cluster.start_timeout_s``; at once if the run has started its own Ray,
    which no machine joins.
    """
    minimum, began = cluster.sizes[0], time.monotonic()
    if not minimum:
        return
    limit_s = cluster.start_timeout_s if cluster.joins else 0.0
    with waiting_for(lambda: f"machines: {_lack(cluster)}", long=True), contextlib.ExitStack() as asked:
        request, asked_at = None, -math.inf
        while lack := _lack(cluster):
            now = time.monotonic()
            if now - began >= limit_s:
                within = f" within {limit_s:.0f} s" if limit_s else ""
                raise RequestError(f"cluster.num_workers = {minimum}: {lack}{within}; {_remedy(cluster)}")
            if request is None:
                request = ray_private.MachineRequest([dict(cluster.worker_resources) for _ in range(minimum)])
                asked.callback(request.cancel)
            if now - asked_at >= _ASK_EVERY_S:
                asked_at = now
                request.renew(expire_after_s=3 * _ASK_EVERY_S)
            time.sleep(0.5)


def _lack(cluster: Cluster) -> str | None:
    """The machines that are missing, in words; None if there is room for the workers and a decoder."""
    minimum, has = cluster.sizes[0], room(_machines(), cluster.worker_resources)
    if has < minimum:
        each = " and ".join(f"{amount:g} {name}" for name, amount in cluster.worker_resources.items() if amount)
        return f"the cluster has room for {has} of {minimum} workers of {each or 'nothing'} each"
    # An autoscaler is asked by the streams.
    if not cluster.joins or _decodes_beside(cluster, minimum) or may_grow():
        return None
    return (
        f"they take {cluster.trainer_cpus(minimum):g} of the cluster's {cluster_cpus():g} CPUs, and decoding needs one"
    )


def _remedy(cluster: Cluster) -> str:
    if room(_machines(), cluster.worker_resources) < cluster.sizes[0]:
        return "ask for no more than it can hold"
    return "ask for fewer, lower cluster.cpus_per_worker, or share them by cluster.decode=actors"


def max_workers(cluster: Cluster) -> int:
    """Maximum number of workers that leave a CPU to decode with, on the current machines.

    Never below the minimum that was requested.
    """
    sizes = cluster.sizes
    return next((n for n in reversed(sizes) if _decodes_beside(cluster, n)), sizes[0])


def _decodes_beside(cluster: Cluster, num_workers: int) -> bool:
    """Whether ``num_workers`` workers leave a CPU to decode with. Actors ask for a part of a CPU, or for none."""
    return cluster_cpus() - cluster.trainer_cpus(num_workers) >= 1 or uses_actors(cluster.decode)


def room(machines: Iterable[Mapping[str, float]], worker: Mapping[str, float]) -> int:
    """The number of workers that fit on machines of these resources."""
    needs = {name: amount for name, amount in worker.items() if amount}
    if not needs:
        return 1 << 30
    return sum(int(min(m.get(name, 0.0) / amount + 1e-9 for name, amount in needs.items())) for m in machines)


def _machines() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def may_grow() -> bool:
    """Whether the cluster has an autoscaler that could bring machines; True if that cannot be told."""
    return _has_autoscaler() is not False


def autoscales() -> bool:
    """Whether the cluster certainly has an autoscaler."""
    return _has_autoscaler() is True


def _has_autoscaler() -> bool | None:
    """None if that cannot be told."""
    if ray_private.autoscaler_limits() or ray_private.has_second_autoscaler():
        return True
    try:
        kinds = json.loads(ray_private.autoscaler_status())["autoscaler_report"]["active_nodes"]
    # Nothing written yet, or the form of another autoscaler.
    except (TypeError, ValueError, KeyError):
        return None
    # Without one, each machine has its own kind, named after it.
    return any(not kind.startswith("node_") for kind in kinds)
