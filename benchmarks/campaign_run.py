"""Runs that a campaign starts, breaks and starts again: recipe, media behind HTTP, processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from pipeline.train.attempts import FOLDER as ATTEMPTS
from pipeline.train.attempts import read_file
from tests.toy_recipe import toy_recipe_of

ROOT = Path(__file__).resolve().parent.parent
# Environment variable that marks all processes of a launch, Ray's own and decoders too.
MARK = "IMP_BENCHMARK_MARK"
# Bytes of the file system that holds the run directories: a few times what one of them holds.
DISK_BYTES = 192 << 20
# CPUs and memory of each machine of a local cluster: one worker, and a CPU to decode with.
NODE = {"num_cpus": 3, "object_store_memory": 200 << 20}
# CPUs that decode in a local cluster: its machines are processes of one, which has no more.
_DECODE_CPUS = 2
# Seconds to wait for processes of a run that has ended.
_LEAVES_S = 60.0


@dataclasses.dataclass(frozen=True)
class Form:
    """A way to run the recipe.

    workers: None runs the loop without Ray, 0 trains in the driver. nodes: machines of a local cluster beside its
    head, 0 for a Ray of the run's own. steps: length of a run. gap: maximum number of steps between two faults.
    start_s: typical seconds to the first step.
    """

    name: str
    workers: int | None
    nodes: int
    steps: int
    gap: int
    start_s: float


FORMS = {
    form.name: form
    for form in (
        Form("bare", workers=None, nodes=0, steps=120, gap=20, start_s=6.0),
        Form("driver", workers=0, nodes=0, steps=160, gap=25, start_s=15.0),
        Form("worker", workers=1, nodes=0, steps=160, gap=25, start_s=20.0),
        Form("nodes", workers=2, nodes=3, steps=160, gap=30, start_s=30.0),
    )
}


def say(text: str) -> None:
    """Prints a line of progress."""
    print(text, file=sys.stderr, flush=True)


def records(run_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The lines of a run's log; one that is being written is left out."""
    path = run_dir / name
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def last_step(run_dir: Path) -> int:
    """The last step in the log, 0 without one."""
    try:
        return records(run_dir)[-1]["step"]
    except (IndexError, ValueError):
        return 0


def finished_checkpoints(run_dir: Path) -> list[int]:
    """The steps of the checkpoints that were finished and are in use, ascending."""
    names = (path.parent.name for path in (run_dir / "checkpoints").glob("*/run.json"))
    return sorted(int(name) for name in names if name.isdigit())


@dataclasses.dataclass(frozen=True)
class Went:
    """A step after a fault. start: the step that its attempt went on from; None in the attempt that had the fault."""

    step: int
    at: float
    start: int | None


def went_after(run_dir: Path, since: float, *, started: bool = False) -> Went | None:
    """The first step that was begun after a moment, as rank 0 noted it. started: only of an attempt begun after it."""
    start, before = None, 0
    for line in read_file(run_dir / ATTEMPTS / "rank-0.jsonl"):
        step = line.get("step", line.get("start_step"))
        if line["at"] < since:
            before = step
        elif line["event"] == "open":
            start = step
        # Of the attempt that had the fault, one step may have been running and one waiting for its record.
        elif start is None and started:
            continue
        elif step > (before + 2 if start is None else start):
            return Went(step, line["at"], start)
    return None


def recipe(corpus: Path, cache: Path, *, num_steps: int) -> dict:
    """The toy recipe with a checkpoint at every fortieth of its steps, quiet."""
    return toy_recipe_of(corpus) | {
        "train": {"num_steps": num_steps, "checkpoint_every": max(1, num_steps // 40), "log_samples": True},
        "cluster": {"compile_cache": str(cache)},
        "logging": {"progress": "none", "writers": []},
    }


def quick_recipe(corpus: Path, cache: Path, *, num_steps: int) -> dict:
    """The recipe cut to two graphs, images and films with sound, which starts in a third of the time."""
    out = recipe(corpus, cache, num_steps=num_steps)
    tasks = out["tasks"]
    del tasks["image_text"], tasks["classes"]["variants"][1:]
    out["model"] |= {"remat": "none"}
    out["train"]["checkpoint_every"] = 5
    return out


def _served(manifest: Path, folder: str, base: str) -> None:
    """Rewrites the media of a manifest as addresses of the server."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(manifest)
    for name in {"image", "video", "audio"} & set(table.column_names):
        paths = [path and f"{base}/{folder}/{path}" for path in table[name].to_pylist()]
        table = table.set_column(table.column_names.index(name), name, pa.array(paths, pa.string()))
    pq.write_table(table, manifest)


class MediaServer:
    """An HTTP server of a folder on this machine, as a process that can be stopped, frozen and started again."""

    def __init__(self, folder: Path, port: int):
        self._command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory"]
        self._command.append(str(folder))
        self._address = ("127.0.0.1", port)
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Returns once it answers."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(self._address, timeout=1):
                return
            time.sleep(0.05)
        raise RuntimeError(f"the media server does not answer at {self._address}")

    def stop(self) -> None:
        """Ends it: connections are refused from now on."""
        self._process.kill()
        self._process.wait()

    @contextlib.contextmanager
    def frozen(self) -> Any:
        """Lets connections in and answers none inside the block."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)


class Site:
    """The folder of a campaign: corpus, recipe, compiled steps, run directories on a small disk of their own."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        port = folder / "port"
        if not port.exists():
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port.write_text(str(free.getsockname()[1]))
        self.server = MediaServer(folder / "corpus", int(port.read_text()))
        self._make_corpus(int(port.read_text()))
        self.logs, self.disk = folder / "logs", folder / "disk"
        for path in (self.logs, self.disk):
            path.mkdir(exist_ok=True)
        self.own_disk = self.disk.is_mount() or _mounted(self.disk)

    def _make_corpus(self, port: int) -> None:
        from pipeline.data import demo

        corpus, done = self.folder / "corpus", self.folder / "served"
        if done.exists():
            return
        shutil.rmtree(corpus, ignore_errors=True)
        demo.build(corpus, limit=48, progress=False)
        for manifest in corpus.glob("*/*.parquet"):
            _served(manifest, manifest.parent.name, f"http://127.0.0.1:{port}")
        done.touch()

    def config(self, form: Form) -> Path:
        """The recipe's file."""
        path = self.folder / f"{form.name}.yaml"
        raw = quick_recipe(self.folder / "corpus", self.folder / "compiled", num_steps=form.steps)
        path.write_text(yaml.safe_dump(raw))
        return path

    def close(self) -> None:
        """Gives the disk back."""
        if self.disk.is_mount():
            subprocess.run(["umount", "-l", str(self.disk)], check=False)


def _mounted(folder: Path) -> bool:
    """Mounts a small file system in memory; False where that is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def marked(mark: str) -> dict[int, str]:
    """Process → command line, of all whose environment has the mark."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                # One that has ended and that nobody waits for has none.
                if line:
                    found[int(entry.name)] = line
    return found


class Launch:
    """One start of the job, with its processes marked."""

    def __init__(self, site: Site, form: Form, run_dir: Path, *, address: str | None = None):
        self.form, self.run_dir = form, run_dir
        self.mark = f"{run_dir}-{time.time_ns()}"
        self.began = time.time()
        self.log = site.logs / f"{run_dir.name}.log"
        self._from = self.log.stat().st_size if self.log.exists() else 0
        env = os.environ | {MARK: self.mark, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                _command(site, form, run_dir, address), stdout=log, stderr=subprocess.STDOUT, env=env
            )

    def said(self) -> str:
        """Its output."""
        with open(self.log, "rb") as log:
            log.seek(self._from)
            return log.read().decode(errors="replace")

    def pids(self, part: str) -> list[int]:
        """Its processes whose command line has ``part``."""
        return sorted(pid for pid, line in marked(f"{MARK}={self.mark}").items() if part in line)

    def running(self) -> bool:
        """Whether the driver runs."""
        return self.process.poll() is None

    def first_step(self, *, timeout_s: float) -> Went | None:
        """The first step of this launch. None if the run ended before it, or did not get there in time.

        A worker of the launch before may take steps until Ray notices that its driver is dead.
        """
        return self.went_on(self.began, timeout_s=timeout_s, started=True)

    def went_on(self, since: float, *, timeout_s: float, started: bool = False) -> Went | None:
        """The first step that was begun after a moment. None if the run ended before it, or did not get there.

        started: of an attempt that was begun after it.
        """
        found: list[Went] = []

        def ready() -> bool:
            went = went_after(self.run_dir, since, started=started)
            found.extend(filter(None, [went]))
            return bool(found)

        self.wait(ready, timeout_s)
        return found[0] if found or ready() else None

    def wait(self, ready: Callable[[], bool], timeout_s: float) -> bool:
        """Waits until ``ready()``; False after the timeout, or if the driver has ended."""
        deadline = time.monotonic() + timeout_s
        while self.running() and time.monotonic() < deadline:
            if ready():
                return True
            time.sleep(0.02)
        return False

    def ended(self, timeout_s: float) -> int | None:
        """Its exit code, or None if it runs on."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout_s)

    def leavings(self) -> list[str]:
        """The processes that have outlived the driver by a minute; they are killed."""
        deadline = time.monotonic() + _LEAVES_S
        while self.pids("") and time.monotonic() < deadline:
            time.sleep(0.2)
        left = marked(f"{MARK}={self.mark}")
        self.kill()
        return list(left.values())

    def kill(self) -> None:
        """Ends every process of it."""
        with contextlib.suppress(OSError):
            self.process.kill()
        self.process.wait()
        for pid in self.pids(""):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def _command(site: Site, form: Form, run_dir: Path, address: str | None) -> list[str]:
    config = str(site.config(form))
    if form.workers is None:
        return [sys.executable, str(ROOT / "tests/pipeline/train/bare_run.py"), config, str(run_dir)]
    command = [sys.executable, str(ROOT / "jobs/pretrain.py"), "--config", config, "--run-dir", str(run_dir)]
    # Ray decodes in actors where there are many CPUs, in tasks elsewhere: each in one of the forms.
    decode = "actors" if form.name == "worker" else "tasks"
    settings = {"cluster.num_workers": form.workers, "cluster.decode": decode}
    if address is not None:
        settings |= {"cluster.address": address, "cluster.cpus_per_worker": 2}
        settings |= {"cluster.decode_cpus": f"[1, {_DECODE_CPUS}]"}
    return command + [x for key, value in settings.items() for x in ("--set", f"{key}={value}")]
