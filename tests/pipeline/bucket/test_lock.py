"""The lock of a run in a bucket: one holder, whatever became of the one before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from pipeline import run_lock
from pipeline.errors import DataError, RequestError
from pipeline.run_dir import lock_run_dir
from pipeline.store import objects
from pipeline.train.checkpoint import Checkpoints

ROOT = Path(__file__).resolve().parents[3]
# Seconds for what must come, on any machine.
PATIENCE_S = 200


def test_two_processes_cannot_share_a_run_directory(run_dir):
    lock = lock_run_dir(run_dir)
    with pytest.raises(RequestError, match="another process is training there"):
        lock_run_dir(run_dir)
    lock.close()
    lock_run_dir(run_dir).close()
    assert not (run_dir / ".lock").exists()


def test_of_many_that_take_the_lock_at_once_one_has_it(run_dir, strict, monkeypatch):
    # A server that keeps its word needs no second look.
    monkeypatch.setattr(run_lock, "_SETTLE_S", 0)
    found = []

    def take():
        try:
            found.append(run_lock.ObjectLock(run_dir / ".lock"))
        except RequestError as e:
            found.append(str(e))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (lock,) = [each for each in found if not isinstance(each, str)]
    assert len(found) == 8
    lock.close()


@pytest.mark.parametrize("scheme", ["gs"])
def test_the_lock_is_taken_though_the_answer_gets_lost(server, run_dir):
    server.control(lost=1)
    lock = lock_run_dir(run_dir)
    # The write that was tried again, and refused for the first one's sake.
    assert server.control()["unmet"] == 1 and server.control()["lost"] == 0
    with pytest.raises(RequestError, match="another process is training there"):
        lock_run_dir(run_dir)
    lock.close()


@pytest.mark.parametrize("scheme", ["s3"])
def test_the_lock_of_a_killed_process_is_free_at_once(run_dir, monkeypatch):
    monkeypatch.setattr(run_lock, "_LEASE_S", 1e6)
    program = f"""
import os
from pipeline.run_dir import lock_run_dir
from pipeline.store.path import run_path
lock_run_dir(run_path({str(run_dir)!r}))
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (run_dir / ".lock").exists()
    lock_run_dir(run_dir).close()


def elsewhere(run_dir, renewals=1):
    value = {"owner": "other", "host": "far", "process": ["boot", "pid:[1]", "7", "99"], "renewals": renewals}
    (run_dir / ".lock").write_bytes(json.dumps(value).encode())


@pytest.mark.parametrize("scheme", ["s3"])
def test_a_holder_on_another_machine_lives_as_long_as_it_renews(run_dir, monkeypatch):
    """On a clock that only waits move."""
    now, renews = 0.0, True

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        if renews:
            elsewhere(run_dir, int(now / run_lock._POLL_S))

    monkeypatch.setattr(run_lock, "time", types.SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    elsewhere(run_dir, 0)
    with pytest.raises(RequestError, match=r"another process is training there \(host far, process 7\)"):
        lock_run_dir(run_dir)
    renews, now = False, 0.0
    lock_run_dir(run_dir).close()
    assert now == run_lock._LEASE_S + run_lock._SETTLE_S


@pytest.mark.parametrize("scheme", ["s3"])
def test_a_holder_whose_lock_was_taken_learns_of_it(run_dir, monkeypatch):
    monkeypatch.setattr(run_lock, "_RENEW_S", 0.05)
    lost = threading.Event()
    lock = run_lock.ObjectLock(run_dir / ".lock", lost=lost.set)
    # Again and again: a renewal that was under way may come after it.
    wait_for(lambda: elsewhere(run_dir) or lost.wait(0.1))
    lock.close()
    assert (run_dir / ".lock").exists()


@pytest.mark.parametrize("scheme", ["gs"])
def test_a_holder_that_was_frozen_after_its_look_does_not_take_the_lock_back(run_dir, monkeypatch):
    monkeypatch.setattr(run_lock, "_RENEW_S", 0.05)
    lost, store, looks = threading.Event(), run_dir.store, []
    lock = run_lock.ObjectLock(run_dir / ".lock", lost=lost.set)
    look = store.versioned

    def taken_after_it(key):
        found = look(key)
        looks.append(found)
        if len(looks) == 3:
            elsewhere(run_dir)
        return found

    monkeypatch.setattr(store, "versioned", taken_after_it)
    assert lost.wait(PATIENCE_S)
    assert [b'"other"' in found for found, _ in looks] == [False] * 3 + [True]
    # Until then it renewed.
    assert len({found for found, _ in looks}) == 4
    lock.close()


@pytest.mark.parametrize("scheme", ["gs"])
def test_a_server_that_refuses_each_condition_has_renewals_too(run_dir, monkeypatch):
    monkeypatch.setattr(run_lock, "_RENEW_S", 0.05)
    lock = run_lock.ObjectLock(run_dir / ".lock")
    monkeypatch.setattr(run_dir.store, "replace", lambda *given: None)
    # One may have been under way.
    for _ in range(2):
        before = (run_dir / ".lock").read_bytes()
        wait_for(lambda before=before: (run_dir / ".lock").read_bytes() != before)
    lock.close()


# Freezes between two renewals, once there is the file that is named last.
DRIVER = """
import os, signal, subprocess, sys, time
from pipeline import run_lock
run_lock._RENEW_S = 0.1
from pipeline.run_dir import lock_run_dir
from pipeline.store.ownership import holder
from pipeline.store.path import run_path
run_dir = run_path(sys.argv[1])
lock = lock_run_dir(run_dir)
closed = lock._closed.wait

def wait(seconds):
    if os.path.exists(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.1)
    return closed(seconds)

lock._closed.wait = wait
worker = subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[1], holder(run_dir)], start_new_session=True)
while True:
    time.sleep(60)
"""
WORKER = """
import sys, time
from pipeline.store import objects
objects._CHECKED_S = 0.05
from pipeline.errors import one_line
from pipeline.store.log import open_log
from pipeline.store.ownership import writing_for
from pipeline.store.path import run_path
run_dir = run_path(sys.argv[1])
with writing_for(sys.argv[2], run_dir):
    try:
        log = open_log(run_dir / "metrics.jsonl")
        while True:
            log.append(b"{}\\n")
            log.sync()
            time.sleep(0.02)
    except OSError as e:
        print(f"worker: {one_line(e)}", flush=True)
"""


@pytest.mark.parametrize("scheme", ["s3", pytest.param("gs", marks=pytest.mark.slow)])
def test_workers_of_a_frozen_driver_write_nothing_once_another_has_its_lock(run_dir, monkeypatch, tmp_path):
    """Real processes: the driver is stopped by SIGSTOP, its worker goes on, and a second driver comes."""
    monkeypatch.setattr(run_lock, "_LEASE_S", 1.0)
    monkeypatch.setattr(run_lock, "_POLL_S", 0.05)
    # The frozen process would count as alive on its own machine.
    monkeypatch.setattr(run_lock, "_is_here", lambda process: False)
    said, freeze = tmp_path / "said", tmp_path / "freeze"
    with said.open("w") as file:
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(run_dir), WORKER, str(freeze)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=file,
            stderr=file,
        )
    metrics = run_dir / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 3, said)
    freeze.touch()
    wait_for(lambda: _state(driver.pid) == "T", said)
    before = metrics.read_bytes().count(b"\n")
    wait_for(lambda: metrics.read_bytes().count(b"\n") > before, said)
    lock = lock_run_dir(run_dir)
    wait_for(lambda: f"worker: another process has taken over {run_dir}\n" in said.read_text(), said)
    # What the second one removes stays away, and it writes itself.
    metrics.unlink()
    (run_dir / "config.yaml").write_text("mine")
    freeze.unlink()
    os.kill(driver.pid, signal.SIGCONT)
    assert driver.wait(PATIENCE_S) == 1
    last = said.read_text().splitlines()[-1]
    assert last == f"failed: another process has taken over {run_dir}; this one ends, its saved state is safe"
    assert not metrics.exists()
    lock.close()


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_for(ready: Callable[[], bool], said: Path | None = None) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        assert time.monotonic() < deadline, said and said.read_text()
        time.sleep(0.02)


def test_no_checkpoint_is_written_or_removed_without_the_lock(run_dir, monkeypatch):
    monkeypatch.setattr(objects, "_CHECKED_S", 0.0)
    # A renewal could take the lock back.
    monkeypatch.setattr(run_lock, "_RENEW_S", 1000.0)
    lock = run_lock.ObjectLock(run_dir / ".lock", lost=lambda: None)
    checkpoints = Checkpoints(run_dir, keep_last=1)
    state = {"encoder": {"params": {"w": jax.numpy.ones(3)}}}
    checkpoints.save(1, state=state, data={})
    checkpoints.wait()
    elsewhere(run_dir)
    before = run_dir.names()
    with pytest.raises(DataError, match=f"another process has taken over {run_dir}"):
        checkpoints.save(2, state=state, data={})
    with pytest.raises(objects.LostLockError):
        (run_dir / "checkpoints/1/run.json").unlink()
    # Other runs of the bucket are not concerned.
    (run_dir.parent / "other/config.yaml").write_bytes(b"of another run")
    assert run_dir.names() == before
    lock.close()
    assert (run_dir / ".lock").exists()
