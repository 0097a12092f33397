"""A head of Ray as a cluster has one, for tests: own ports, own folder, token authentication, its dashboard.

With types of machines Ray's autoscaler starts and ends those that it is asked for, as processes of this machine.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import ray

from tests.ports import free_port

# The address that machines which are processes take by themselves.
IP = ray.util.get_node_ip_address()
# Ports of a machine for whose numbers it would wait, and end itself if a busy machine starts its agents late.
_AGENTS = ("metrics-export-port", "dashboard-agent-grpc-port", "dashboard-agent-listen-port", "runtime-env-agent-port")
# Ports of a head: its agents', and those that Ray would take at fixed numbers.
_PORTS = (*_AGENTS, "port", "dashboard-port", "ray-client-server-port")
# Seconds for a head or a machine to start, and for a head to end by itself.
_START_S, _END_S = 150.0, 4.0

# Identity of the head for the provider of machines that are processes.
_HEAD_ID = "f" * 51 + "0" * 5
_LISTS = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
_LISTS += (
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "cluster_synced_files",
    "rsync_exclude",
    "rsync_filter",
)
# Environment of a head whose autoscaler looks every second.
_AUTOSCALER = {
    "RAY_FAKE_CLUSTER": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
}


class Head:
    """A running head. environment: of programs that talk to it."""

    def __init__(self, folder: Path, ports: dict[str, int], environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.address = f"{IP}:{ports['port']}"
        self.dashboard = f"http://127.0.0.1:{ports['dashboard-port']}"

    def ray(self, *arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
        """Runs Ray's command line against the head."""
        return subprocess.run(
            ["ray", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            cwd=cwd,
            env=self.environment | environment,
        )

    def machine(self, *arguments: str) -> Machine:
        """A machine that has joined. arguments: of ``ray start``."""
        machine = Machine(self, *arguments)
        machine.await_joined()
        return machine


class Machine:
    """A machine of a cluster, as processes of this one; it joins by and by. arguments: of ``ray start``."""

    def __init__(self, head: Head, *arguments: str) -> None:
        # Sockets of its own: two that start at once would take each other's.
        folder = Path(tempfile.mkdtemp(dir=head.folder))
        command = ["ray", "start", "--block", f"--address={head.address}", f"--node-ip-address={IP}"]
        command += [f"--temp-dir={folder}", "--include-log-monitor=false", "--disable-usage-stats"]
        command += ["--min-worker-port=0", "--max-worker-port=0", *arguments]
        command += [f"--{name}={free_port()}" for name in _AGENTS]
        self._log = folder / "log"
        self._process = _started(command, self._log, head.environment)

    def await_joined(self) -> None:
        """Waits until the head knows it."""
        _await_started(self._process, self._log)

    def processes(self) -> list[psutil.Process]:
        """All that run on it; none once it is dead."""
        with contextlib.suppress(psutil.Error):
            return [self._process, *self._process.children(recursive=True)]
        return []

    def runs(self, name: str) -> bool:
        """Whether it runs a process whose command line begins with ``name``."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if "".join(process.cmdline()[:1]).startswith(name):
                    return True
        return False

    def die(self) -> None:
        """Ends all of it at once, without a word to the others."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._process.wait()


@contextlib.contextmanager
def ray_head(*arguments: str, node_types: dict | None = None, **environment: str) -> Iterator[Head]:
    """Starts a head and ends it. arguments: of ``ray start``. node_types: of ``cluster.yaml``, the head's left out."""
    # Sockets have short names.
    folder = Path(tempfile.mkdtemp(prefix="imp", dir="/tmp"))
    ports = {name: free_port() for name in _PORTS}
    head = Head(folder, ports, _environment(folder) | environment)
    process = None
    if node_types:
        arguments = (*arguments, f"--autoscaling-config={_autoscaling_config(folder, head.address, node_types)}")
        head.environment |= _AUTOSCALER
    try:
        assert head.ray("get-auth-token", "--generate").returncode == 0
        command = ["ray", "start", "--head", "--block", f"--node-ip-address={IP}", f"--temp-dir={folder}/ray"]
        command += ["--dashboard-host=127.0.0.1", "--include-dashboard=true", "--disable-usage-stats"]
        command += ["--min-worker-port=0", "--max-worker-port=0", *(f"--{name}={p}" for name, p in ports.items())]
        process = _started([*command, *arguments], folder / "head.log", head.environment)
        _await_started(process, folder / "head.log")
        _await_dashboard(head, process)
        yield head
    finally:
        if process is not None:
            _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _environment(folder: Path) -> dict[str, str]:
    """Of a user with a home of its own, to whom the project is a clone alone."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("RAY_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", "")])
    own = {"HOME": str(folder), "PATH": path, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    # A machine that is busy takes longer than Ray's half a minute.
    own["RAY_raylet_start_wait_time_s"] = "120"
    return inherited | own | {"IMP_CACHE": str(folder / "cache"), "JAX_PLATFORMS": "cpu"}


def _autoscaling_config(folder: Path, address: str, node_types: dict) -> Path:
    """The file of ``ray start`` for machines that are processes; idle ones end after seconds."""
    head = {"ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}}
    config = {
        "cluster_name": "local",
        "max_workers": sum(kind["max_workers"] for kind in node_types.values()),
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 20,
        "provider": {
            # As "fake_multinode", whose defaults are not in Ray's wheel.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": _HEAD_ID,
            "gcs_address": address,
        },
        "auth": {},
        "available_node_types": head | {name: kind | {"node_config": {}} for name, kind in node_types.items()},
        "head_node_type": "ray.head.default",
        # The lists that a whole file of ``ray up`` has.
        **{name: [] for name in _LISTS},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
    }
    path = folder / "autoscaling.json"
    path.write_text(json.dumps(config))
    return path


def _started(command: list[str], log: Path, environment: dict[str, str]) -> psutil.Popen:
    with open(log, "w") as file:
        return psutil.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)


def _await_started(process: psutil.Popen, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while "Ray runtime started" not in (said := log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, said
        time.sleep(0.1)


def _await_dashboard(head: Head, process: psutil.Popen) -> None:
    token = (head.folder / ".ray/auth_token").read_text().strip()
    deadline = time.monotonic() + _START_S
    while not _lists_jobs(head.dashboard, token):
        said = (head.folder / "head.log").read_text()
        assert process.poll() is None and time.monotonic() < deadline, said
        time.sleep(0.1)


def _lists_jobs(dashboard: str, token: str) -> bool:
    """Whether a dashboard answers as it does to ``ray job list``, whose process alone would take seconds."""
    with contextlib.closing(http.client.HTTPConnection(dashboard.removeprefix("http://"), timeout=30)) as connection:
        try:
            connection.request("GET", "/api/jobs/", headers={"Authorization": f"Bearer {token}"})
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False


def _end(process: psutil.Popen) -> None:
    """Ends a head by SIGTERM, and kills what has not ended then: its raylet may wait for actors that nobody ends."""
    processes = [process]
    with contextlib.suppress(psutil.Error):
        processes += process.children(recursive=True)
        process.terminate()
    for left in psutil.wait_procs(processes, timeout=_END_S)[1]:
        with contextlib.suppress(psutil.Error):
            left.kill()
    process.wait()
