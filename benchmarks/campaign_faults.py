"""The faults of a campaign: what is broken, in which form of a run, and what must come of it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.campaign_run import NODE, Launch, Site, finished_checkpoints, say
from pipeline.errors import one_line

# Command lines of a run's processes: the driver is known by its id.
PARTS = {
    "child": "decode_worker",
    "decoder": "ray::Map",
    "worker": "ray::RayTrainWorker",
    "coordinator": "ray::StepCoordinator",
    "controller": "ray::_Controller",
    "raylet": "raylet/raylet",
    "gcs": "gcs_server",
}
# Number of times that a local cluster is started before its campaign ends.
_STARTS = 3
# Maximum number of seconds that a full disk, or storage that is away, lasts.
_HELD_S = 15.0
# Seconds for which a process is stopped: short, and longer than any heartbeat.
_PAUSE_S, _LONG_PAUSE_S = (1.0, 8.0), (61.0, 75.0)


@dataclasses.dataclass
class Round:
    """One fault's surroundings. draw: its own random numbers. cluster: of the form with nodes."""

    site: Site
    launch: Launch
    draw: random.Random
    cluster: LocalCluster | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of fault.

    inject: does it; False where there is nothing to break now. ends: the run must end (True), must go on by itself
    (False), or either. forms: in which it can be made. weight: how often, beside the others of a form.
    """

    name: str
    inject: Callable[[Round], bool]
    ends: bool | None
    forms: tuple[str, ...]
    weight: float = 1.0


def _kill(pid: int, number: int = signal.SIGKILL) -> bool:
    with contextlib.suppress(OSError):
        os.kill(pid, number)
        return True
    return False


def _driver(at: Round) -> bool:
    at.launch.process.kill()
    at.launch.process.wait()
    return True


def _terminate(at: Round) -> bool:
    at.launch.process.terminate()
    return True


def _part(name: str) -> Callable[[Round], bool]:
    def kill(at: Round) -> bool:
        pids = at.launch.pids(PARTS[name])
        return bool(pids) and _kill(at.draw.choice(pids))

    return kill


def _pids(at: Round) -> dict[int, str]:
    """The processes of a run that a campaign may stop, each with the name of its part."""
    found = {pid: name for name, part in PARTS.items() for pid in at.launch.pids(part)}
    return {at.launch.process.pid: "driver"} | found


def _pause(bounds: tuple[float, float]) -> Callable[[Round], bool]:
    def pause(at: Round) -> bool:
        pid, name = at.draw.choice(sorted(_pids(at).items()))
        seconds = at.draw.uniform(*bounds)
        at.note = f"{name}, {seconds:.0f} s"
        if not _kill(pid, signal.SIGSTOP):
            return False
        try:
            time.sleep(seconds)
        finally:
            _kill(pid, signal.SIGCONT)
        return True

    return pause


def _fill_disk(at: Round) -> bool:
    """Leaves less than a checkpoint, until the run ends or for some seconds."""
    if not at.site.own_disk:
        return False
    ballast = at.site.disk / "ballast"
    left = at.draw.randrange(1 << 20)
    try:
        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while (free := shutil.disk_usage(at.site.disk).free) > left:
                file.write(b"\0" * min(1 << 20, free - left))
        at.launch.ended(at.draw.uniform(0.5, _HELD_S))
    finally:
        ballast.unlink(missing_ok=True)
    at.note = f"{left} bytes left"
    return True


def _storage_away(at: Round) -> bool:
    seconds = at.draw.uniform(0.5, _HELD_S)
    at.note = f"{seconds:.0f} s"
    at.site.server.stop()
    try:
        time.sleep(seconds)
    finally:
        at.site.server.start()
    return True


def _storage_frozen(at: Round) -> bool:
    seconds = at.draw.uniform(0.5, _HELD_S)
    at.note = f"{seconds:.0f} s"
    with at.site.server.frozen():
        time.sleep(seconds)
    return True


def _damaged(change: Callable[[bytearray, random.Random], bytearray]) -> Callable[[Round], bool]:
    """Kills the driver, then damages a file of the newest checkpoint."""

    def damage(at: Round) -> bool:
        # A run whose every checkpoint is damaged cannot come back: one must be left.
        if len(finished_checkpoints(at.launch.run_dir)) < 2:
            return False
        # Workers of Ray's would still be saving: the newest is that of the moment at which nothing writes.
        at.launch.kill()
        folder = at.launch.run_dir / "checkpoints" / str(finished_checkpoints(at.launch.run_dir)[-1])
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
        path = at.draw.choice(files)
        path.write_bytes(change(bytearray(path.read_bytes()), at.draw))
        at.note = str(path.relative_to(folder.parent))
        return True

    return damage


def _torn(data: bytearray, draw: random.Random) -> bytearray:
    return data[: draw.randrange(len(data))]


def _flipped(data: bytearray, draw: random.Random) -> bytearray:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return data


def _twice(at: Round) -> bool:
    """Two kills in a row, the second while the run starts again."""
    _driver(at)
    again = Launch(at.site, at.launch.form, at.launch.run_dir, address=at.cluster and at.cluster.address)
    seconds = at.draw.uniform(0.0, at.launch.form.start_s)
    again.ended(seconds)
    at.note = f"the second after {seconds:.1f} s"
    again.process.kill()
    again.process.wait()
    return True


def _node(at: Round) -> bool:
    at.note = at.cluster.lose(at.draw)
    return True


_RAY = ("driver", "worker", "nodes")
_ALL = ("bare", *_RAY)
KINDS = (
    Kind("driver", _driver, True, _ALL, 2.0),
    Kind("twice", _twice, True, _ALL),
    Kind("sigterm", _terminate, True, _ALL),
    Kind("torn", _damaged(_torn), True, ("bare", "driver", "worker")),
    Kind("flipped", _damaged(_flipped), True, ("bare", "driver", "worker")),
    Kind("disk full", _fill_disk, None, ("bare", "driver", "worker")),
    Kind("storage away", _storage_away, None, _ALL),
    Kind("storage frozen", _storage_frozen, None, _ALL, 0.5),
    Kind("pause", _pause(_PAUSE_S), None, _ALL, 0.7),
    Kind("long pause", _pause(_LONG_PAUSE_S), None, _ALL, 0.1),
    Kind("child", _part("child"), False, ("bare", "driver", "worker"), 2.0),
    Kind("decoder", _part("decoder"), False, ("driver", "worker"), 2.0),
    Kind("worker", _part("worker"), False, ("worker",), 3.0),
    Kind("coordinator", _part("coordinator"), None, ("worker",), 0.5),
    Kind("controller", _part("controller"), None, ("worker",), 0.5),
    Kind("raylet", _part("raylet"), None, ("driver", "worker"), 0.7),
    Kind("gcs", _part("gcs"), True, ("driver", "worker"), 0.5),
    Kind("node", _node, False, ("nodes",), 4.0),
)


def kinds_of(form: str, site: Site) -> list[Kind]:
    """The kinds that this place can make of a form."""
    return [kind for kind in KINDS if form in kind.forms and (site.own_disk or kind.name != "disk full")]


class LocalCluster:
    """A cluster of processes on this machine: a head that lends no CPU to workers, and machines that come and go."""

    def __init__(self, nodes: int):
        from ray.cluster_utils import Cluster

        # As in a Ray that a run starts itself: by default a trainer yields to all else on a busy machine.
        os.environ.setdefault("RAY_worker_niceness", "5")
        self._cluster = Cluster(initialize_head=True, head_node_args=NODE | {"num_cpus": 1})
        self._size = nodes
        self._nodes: list[Any] = []
        self.fill()

    @property
    def address(self) -> str:
        """That a run joins."""
        return self._cluster.address

    def fill(self) -> None:
        """Machines join until none is missing."""
        while len(self._nodes) < self._size:
            self._nodes.append(self._cluster.add_node(**NODE))

    def lose(self, draw: random.Random) -> str:
        """A machine dies with all its processes. Returns which."""
        number = draw.randrange(len(self._nodes))
        self._cluster.remove_node(self._nodes.pop(number), allow_graceful=False)
        return f"machine {number + 1} of {len(self._nodes) + 1}"

    def close(self) -> None:
        """Ends it."""
        self._cluster.shutdown()


def _started(nodes: int) -> LocalCluster:
    """A cluster; Ray gives up a machine that has not started within 30 s, as on one that is busy."""
    for number in range(_STARTS - 1):
        try:
            return LocalCluster(nodes)
        except Exception as e:
            say(f"start {number + 1} of a local cluster failed: {one_line(e)[:200]}")
    return LocalCluster(nodes)


@contextlib.contextmanager
def local_cluster(nodes: int) -> Iterator[LocalCluster | None]:
    """A cluster with this number of machines beside its head; none for 0."""
    if not nodes:
        yield None
        return
    cluster = _started(nodes)
    try:
        yield cluster
    finally:
        cluster.close()


def await_save(launch: Launch, timeout_s: float) -> None:
    """Waits until a checkpoint is being written."""
    folder: Path = launch.run_dir / "checkpoints"
    launch.wait(lambda: any(folder.glob("*.orbax-checkpoint-tmp*")), timeout_s)
