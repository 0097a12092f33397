"""Every private part of Ray that this project touches, but for those of ``ray_input`` and ``ray_train``. All were read
in Ray 2.60.0, for whose sake pyproject.toml keeps Ray below 2.61: read them again before the bound moves.

Libraries of Ray are imported inside the functions: a process that decodes files needs neither Ray Data nor Ray Train.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import ray
from ray._private import ray_constants
from ray._private.authentication import authentication_token_setup
from ray.experimental import internal_kv

# Seconds for the address of a head to accept.
_CONNECT_S = 5.0
# Maximum bytes of the name of a socket (Ray's number), and of its part below Ray's folder.
_MAX_SOCKET_NAME = 103 if sys.platform == "darwin" else 107
_SOCKET_NAME = len("/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store")


def listen_on_this_machine_alone() -> None:
    """Makes the Ray that is started next take 127.0.0.1 as its address.

    Ray has this switch for machines that no other machine can reach (``ray._private.services`` reads it). Without it
    Ray listens on the interface of the node's address. Ray's processes read the variable; this one has read it already.
    """
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False


def session_folder() -> str | None:
    """The folder of the Ray that is started next, if its own choice below ``TMPDIR`` is too long for sockets' names."""
    chosen = ray._common.utils.get_default_ray_temp_dir()
    too_long = len(os.fsencode(chosen)) + _SOCKET_NAME > _MAX_SOCKET_NAME
    return "/tmp/ray" if too_long and "RAY_TMPDIR" not in os.environ else None


@contextlib.contextmanager
def lean_head() -> Iterator[None]:
    """Lets ``ray.init`` start no process that only a shared cluster needs, inside the block.

    These are its autoscaler, its dashboard, for which it waits, and its log monitor: two seconds of a CPU in all.
    """
    from ray._private.node import Node

    names = ("start_monitor", "start_api_server", "start_log_monitor")
    before = {name: getattr(Node, name) for name in names}
    for name in names:
        setattr(Node, name, lambda node, **options: None)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Node, name, method)


def head_answers() -> bool:
    """Whether the GCS of this process's Ray runs, if it was started here; else whether its address accepts."""
    node = ray._private.worker._global_node
    if node is None:
        return True
    if own := node.all_processes.get(ray_constants.PROCESS_TYPE_GCS_SERVER):
        return own[0].process.poll() is None
    host, _, port = node.gcs_address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError:
        return False
    return True


def token_path() -> Path:
    """The file of this user's token. Ray would make one that all users can read."""
    return authentication_token_setup._get_default_token_path()


def autoscaler_limits() -> dict[str, float] | None:
    """Maximum resources that an autoscaler of the second version may reach; empty or None without one."""
    return ray._private.state.state.get_max_resources_from_cluster_config()


def has_second_autoscaler() -> bool:
    """Whether the head runs an autoscaler of the second version, which need not tell its limits."""
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    return is_autoscaler_v2(fetch_from_server=True)


def autoscaler_status() -> bytes | None:
    """JSON of the autoscaler of the first version; None if it has written nothing yet."""
    return internal_kv._internal_kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS)


def free_cpus() -> list[float]:
    """CPUs of each machine that nothing uses at the moment. The public count is that of all machines together."""
    return [each.get("CPU", 0.0) for each in ray._private.state.available_resources_per_node().values()]


class MachineRequest:
    """A request to the autoscaler for machines that hold ``bundles`` all at once; without one nothing happens.

    It goes to Ray's actor where the requests of Ray Train and of the streams meet: sent past it, it would replace
    theirs. They are added up, so it is to be cancelled before Ray Train asks for the same.
    """

    def __init__(self, bundles: list[dict[str, float]]):
        from ray.data._internal.cluster_autoscaler import DefaultAutoscalingCoordinator

        self._bundles = bundles
        self._coordinator = DefaultAutoscalingCoordinator(f"imp-{ray.get_runtime_context().get_job_id()}")

    def renew(self, *, expire_after_s: float) -> None:
        """Sends it, again if it was sent before."""
        self._coordinator.request_resources(self._bundles, expire_after_s=expire_after_s)

    def cancel(self) -> None:
        """Asks for nothing any more."""
        self._coordinator.cancel_request()


def keep_shared_actors_here() -> None:
    """Starts the actors that Ray Data keeps in a cluster for good, on this machine.

    Each is pinned to the machine that first needs it, and an autoscaler never ends a machine with an actor: a trainer
    would cost money after its run.
    """
    from ray.data._internal import stats, stats_summary_actor
    from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
    from ray.data._internal.execution.node_trackers import get_or_create_actor_location_tracker
    from ray.data._internal.usage.actor import get_or_create_usage_collection_actor

    get_or_create_autoscaling_coordinator()
    get_or_create_actor_location_tracker()
    get_or_create_usage_collection_actor()
    stats.get_or_create_stats_actor()
    stats_summary_actor._get_or_create_stats_summary_actor()
