"""Starts this machine's own Ray, or joins a cluster, and leaves it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import ray

from pipeline.cluster import ray_private
from pipeline.cluster.capacity import check_machine
from pipeline.cluster.spec import Cluster
from pipeline.errors import EXIT_REQUEST, DataError, RequestError, one_line
from pipeline.host_memory import machine_bytes, machine_cpus
from pipeline.waiting import at_most, waiting_for

# Seconds for an address to accept.
_CONNECT_S = 5.0
# Seconds for Ray at an address to answer.
_ANSWER_S = 25.0
# Seconds for a cluster to take the driver in.
_JOIN_S = 25.0
# Settings of Ray Train on a Ray of the run's own: no machine of it is taken away with a notice that it must look out
# for, and a worker that has died is noticed within half a second, not two.
_OWN_RAY = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Nobody reads the metrics and the events of tasks of a Ray without a dashboard.
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
}


def start_ray(cluster: Cluster, *, driver_cpus: int = 1) -> None:
    """Joins the cluster that was asked for (a submitted job, ``cluster.address``), or starts one on this machine.

    driver_cpus: CPUs of this machine that the driver's own work needs. Raises RequestError if what is asked for is
    missing.
    """
    if ray.is_initialized():
        return
    quiet_ray_data()
    # Nothing of a run leaves the machine without being asked for.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Every process of a stream announces what it executes.
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    if cluster.joins:
        with waiting_for(f"Ray at {cluster.joins}"):
            _join(cluster.joins, "cluster.address" if cluster.address else "RAY_ADDRESS")
    else:
        check_machine(cluster)
        with waiting_for("this machine's Ray to start"):
            _start(cluster, driver_cpus=driver_cpus)


def quiet_ray_data() -> None:
    """Silences Ray Data, which announces every execution, and what it says of settings that have no successor yet."""
    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Only in this way is Ray told where to decode, and how often to try again (ray 2.60).
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")


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
    """Raises RequestError if nothing listens at ``host:port``, or no Ray does.

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
    # Ray starts its processes by fork with an immediate exec, which is safe beside JAX's threads.
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")
    # Ray's default of 15 gives decode a twentieth of a core while the trainer beside it compiles; 5 gives a third.
    os.environ.setdefault("RAY_worker_niceness", "5")
    ray_private.listen_on_this_machine_alone()
    _own_token()
    # Decode must find whole CPUs beside the trainers, so theirs are counted on top.
    cpus = max(1, machine_cpus() - driver_cpus) + math.ceil(min(cluster.trainer_cpus(), machine_cpus()))
    # "local": a head that someone started on this machine is joined only if ``cluster.address`` says so.
    with _faults_in_a_line(), ray_private.lean_head(), _inherited(_OWN_RAY):
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            object_store_memory=_object_store_bytes(),
            # Nothing asks for it. Ray's own number is of what is free, and on a busy machine it refuses to start.
            _memory=machine_bytes(),
            _temp_dir=ray_private.session_folder(),
            logging_level="error",
            log_to_driver=False,
        )


@contextlib.contextmanager
def _faults_in_a_line() -> Iterator[None]:
    """Raises DataError for what Ray raises when a machine does not let it start."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as e:
        raise DataError(
            f"this machine's Ray did not start: {one_line(e)[:300]}; mend that, or let RAY_TMPDIR name a folder that "
            "has room, can be written and has a short name"
        ) from e


@contextlib.contextmanager
def _inherited(values: dict[str, str]) -> Iterator[None]:
    """Sets variables for the processes that are started inside the block, but those that the user has set."""
    missing = values.keys() - os.environ.keys()
    os.environ.update({name: values[name] for name in missing})
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def end_ray() -> None:
    """Leaves Ray, and ends the one that this process has started. Later calls of Ray fail and start nothing."""
    with contextlib.suppress(Exception):
        ray.shutdown()


def _own_token() -> None:
    """Makes the token of this user's Ray a file that no other user can read.

    If the home folder cannot be written, as in many containers, the token is in the environment of this process and
    those that it starts: it ends with the run, as this Ray does.
    """
    path = ray_private.token_path()
    try:
        _write_token(path)
    except OSError:
        if not os.access(path, os.R_OK) and not os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _write_token(path: Path) -> None:
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
    return min(max(machine_bytes() // 10, 512 << 20), 8 << 30)
