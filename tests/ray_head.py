"""A head of Ray as a cluster has one, for tests: own ports, own folder, token authentication, its dashboard."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

# Ports of a head that Ray would take at fixed numbers.
_PORTS = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port")


class Head:
    """A running head. environment: of programs that talk to it."""

    def __init__(self, folder: Path, ports: dict[str, int], environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.address = f"127.0.0.1:{ports['port']}"
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


@contextlib.contextmanager
def ray_head(*arguments: str, **environment: str) -> Iterator[Head]:
    """Starts a head and ends it. arguments: of ``ray start``."""
    # Sockets have short names.
    folder = Path(tempfile.mkdtemp(prefix="imp", dir="/tmp"))
    ports = _free_ports()
    head = Head(folder, ports, _environment(folder) | environment)
    process = None
    try:
        assert head.ray("get-auth-token", "--generate").returncode == 0
        command = ["ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}/ray"]
        command += ["--dashboard-host=127.0.0.1", "--include-dashboard=true", "--disable-usage-stats"]
        command += ["--min-worker-port=0", "--max-worker-port=0", *(f"--{name}={p}" for name, p in ports.items())]
        with open(folder / "head.log", "w") as log:
            process = subprocess.Popen(
                [*command, *arguments], stdout=log, stderr=log, env=head.environment, start_new_session=True
            )
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
    return inherited | own | {"IMP_CACHE": str(folder / "cache"), "JAX_PLATFORMS": "cpu"}


def _free_ports() -> dict[str, int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in _PORTS]
        return {name: s.getsockname()[1] for name, s in zip(_PORTS, sockets, strict=True)}


def _await_dashboard(head: Head, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while head.ray("job", "list", "--address", head.dashboard).returncode:
        said = (head.folder / "head.log").read_text()
        assert process.poll() is None and time.monotonic() < deadline, said
        time.sleep(0.5)


def _end(process: subprocess.Popen) -> None:
    """Ends a head: ``ray start --block`` ends its processes at SIGTERM; whatever is left dies with its group."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
