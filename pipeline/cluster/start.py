"""Where a run runs: this machine's own Ray, or a cluster that is joined; what is not there is said before any wait."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import ray
from ray._private import ray_constants
from ray._private.authentication import authentication_token_setup
from ray.experimental import internal_kv

from pipeline.cluster.spec import Cluster
from pipeline.cluster.streams import quiet_ray_data, uses_actors
from pipeline.errors import EXIT_REQUEST, RequestError, one_line
from pipeline.host_memory import machine_cpus
from pipeline.waiting import at_most, waiting_for

# Seconds for an address to accept, for Ray there to answer, and to take the driver in.
_CONNECT_S, _ANSWER_S, _JOIN_S = 5.0, 25.0, 25.0
# Seconds for machines that are about to join a cluster without an autoscaler.
_JOINING_S = 30.0


def start_ray(cluster: Cluster, *, driver_cpus: int = 1) -> None:
    """Joins the cluster that is there (a submitted job, ``cluster.address``), or starts one on this machine.

    driver_cpus: CPUs of this machine that the driver's own work needs. Raises RequestError where what is asked for is
    not there.
    """
    if ray.is_initialized():
        return
    quiet_ray_data()
    # Nothing of a run leaves the machine without being asked for.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Every process of a stream announces what it executes.
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    # What a worker prints comes once to the driver (``ray_trainer``), not a second time through a logger.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    if cluster.joins:
        with waiting_for(f"Ray at {cluster.joins}"):
            _join(cluster.joins, "cluster.address" if cluster.address else "RAY_ADDRESS")
    else:
        _check_machine(cluster)
        with waiting_for("this machine's Ray to start"):
            _start(cluster, driver_cpus=driver_cpus)


def _join(address: str, key: str) -> None:
    _check_answers(address, key)
    line = f"error: {key}: {address} did not let this run in within {_JOIN_S:.0f} s; is a Ray of this version there?"
    with at_most(_JOIN_S, line, code=EXIT_REQUEST):
        try:
            # Ray's log monitor would print the logs of all of the machine's processes (libtpu's) here.
            ray.init(address=address, logging_level="error", log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as e:
            raise RequestError(f"{key}: expected a running Ray at {address}, found none: {one_line(e)[:200]}") from e


def _check_answers(address: str, key: str) -> None:
    """Raises RequestError where nothing listens at ``host:port``, or no Ray does.

    Ray itself would try for minutes, with a line of its core's for each try.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as e:
        raise RequestError(f"{key}: expected a running Ray at {address}, found none: {one_line(e)}") from e
    if "://" in address:
        # The server of Ray's client answers no such question.
        return
    ask = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", f"{host}:{port}"]
    try:
        done = subprocess.run(ask, capture_output=True, timeout=_ANSWER_S)
    except subprocess.TimeoutExpired as e:
        raise RequestError(f"{key}: what listens at {address} did not answer within {_ANSWER_S:.0f} s") from e
    if done.returncode:
        raise RequestError(
            f"{key}: expected a Ray {ray.__version__} at {address}, found another version or something else"
        )


def _start(cluster: Cluster, *, driver_cpus: int) -> None:
    # Ray starts its processes by fork and exec at once, which is safe beside JAX's threads.
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")
    # Ray's default of 15 gives decode a twentieth of a core while the trainer beside it compiles; 5 gives a third.
    os.environ.setdefault("RAY_worker_niceness", "5")
    # Ray listens on the interface of its node's address. This is its switch for machines of which no other is to be
    # reached: the address is then 127.0.0.1. Its processes read the variable, this one has read it already.
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    _own_token()
    # Decode must find CPUs beside the trainers, so theirs are counted on top.
    cpus = max(1, machine_cpus() - driver_cpus) + round(min(cluster.trainer_cpus(), machine_cpus()))
    # "local": a head that someone started on this machine is joined only where ``cluster.address`` says so.
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        object_store_memory=_object_store_bytes(),
        logging_level="error",
        log_to_driver=False,
    )


def end_ray() -> None:
    """Leaves Ray, and ends the one that this process has started. What still calls it then fails and starts nothing."""
    with contextlib.suppress(Exception):
        ray.shutdown()


def _own_token() -> None:
    """The token of this user's Ray, for no other user to read; Ray would make one that all can."""
    path = authentication_token_setup._get_default_token_path()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            if path.stat().st_uid == os.getuid():
                path.chmod(path.stat().st_mode & 0o700)
            return
        with open(file, "w") as f:
            f.write(secrets.token_hex(32))


def _object_store_bytes() -> int:
    """A tenth of the memory, between 0.5 and 8 GB: streams are bounded, so more would only be reserved."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min(max(total // 10, 512 << 20), 8 << 30))


# --- what is asked for and not there ---


def _check_machine(cluster: Cluster) -> None:
    """Raises RequestError where this machine alone cannot hold the workers."""
    least, cpus = cluster.sizes[0], machine_cpus()
    if least * cluster.cpus_per_worker > cpus:
        raise RequestError(
            f"cluster.num_workers = {least}: that many workers of {cluster.cpus_per_worker:g} CPUs need "
            f"{least * cluster.cpus_per_worker:g}, this machine has {cpus}; ask for fewer, join a cluster "
            "(cluster.address), or lower cluster.cpus_per_worker for them to share"
        )


def check_accelerator(cluster: Cluster) -> None:
    """Raises RequestError where a run on this machine asks for an accelerator that it has no device of.

    Asks the device files alone: the libraries may hang where a device is broken or held.
    """
    if cluster.joins or cluster.accelerator == "cpu":
        return
    patterns = _DEVICE_FILES[cluster.accelerator]
    if not any(True for pattern in patterns for _ in Path("/dev").glob(pattern)):
        raise RequestError(
            f"cluster.accelerator: {cluster.accelerator}: this machine has none (no /dev/{', /dev/'.join(patterns)}); "
            "leave the key out to train on CPUs, or join a cluster that has one (cluster.address)"
        )


# NVIDIA, NVIDIA under WSL, AMD; TPUs up to v4 and later ones.
_DEVICE_FILES = {"gpu": ("nvidia[0-9]*", "dxg", "kfd"), "tpu": ("accel*", "vfio/[0-9]*")}


def await_room(cluster: Cluster) -> None:
    """Waits until the machines of the cluster can hold the workers, where more may come.

    Raises RequestError where none may, or none has within ``cluster.start_timeout_s``.
    """
    least, began = cluster.sizes[0], time.monotonic()
    if not least:
        return
    limit_s = 0.0 if not cluster.joins else cluster.start_timeout_s if _may_grow() else _JOINING_S
    limit_s = min(limit_s, cluster.start_timeout_s)
    with waiting_for(lambda: f"machines: {_lack(cluster)}"):
        while room(_machines(), cluster.worker_resources) < least:
            if time.monotonic() - began >= limit_s:
                within = f" within {limit_s:.0f} s" if limit_s else ""
                raise RequestError(f"cluster.num_workers = {least}: {_lack(cluster)}{within}; ask for what there is")
            time.sleep(0.5)
    if cluster.joins:
        _check_decode_cpus(cluster)


def _check_decode_cpus(cluster: Cluster) -> None:
    """Raises RequestError where the workers leave no CPU to decode with: streams would wait for one without a bound."""
    least, cpus = cluster.sizes[0], sum(machine.get("CPU", 0.0) for machine in _machines())
    # Actors ask for a part of a CPU, or for none.
    if cpus - cluster.trainer_cpus(least) >= 1 or uses_actors(cluster.decode) or _may_grow():
        return
    raise RequestError(
        f"cluster.num_workers = {least}: they take {cluster.trainer_cpus(least):g} of the cluster's {cpus:g} CPUs, and "
        "decoding needs one; ask for fewer, lower cluster.cpus_per_worker, or share them by cluster.decode=actors"
    )


def _lack(cluster: Cluster) -> str:
    least, has = cluster.sizes[0], room(_machines(), cluster.worker_resources)
    each = " and ".join(f"{amount:g} {name}" for name, amount in cluster.worker_resources.items() if amount)
    return f"the cluster has room for {has} of {least} workers of {each or 'nothing'} each"


def _machines() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def room(machines: Iterable[Mapping[str, float]], worker: Mapping[str, float]) -> int:
    """How many workers fit on machines of these resources."""
    needs = {name: amount for name, amount in worker.items() if amount}
    if not needs:
        return 1 << 30
    return sum(int(min(m.get(name, 0.0) / amount + 1e-9 for name, amount in needs.items())) for m in machines)


def _may_grow() -> bool:
    """Whether the cluster has an autoscaler that could bring machines; yes where that cannot be told."""
    if ray._private.state.state.get_max_resources_from_cluster_config():
        return True
    status = internal_kv._internal_kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS)
    try:
        kinds = json.loads(status)["autoscaler_report"]["active_nodes"]
    # Nothing there yet, or the form of another autoscaler.
    except (TypeError, ValueError, KeyError):
        return True
    # Without one, each machine is of a kind of its own, named after it.
    return any(not kind.startswith("node_") for kind in kinds)
