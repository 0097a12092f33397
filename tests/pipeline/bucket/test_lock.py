"""The lock of a run in a bucket: one holder, whatever became of the one before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline import run_lock
from pipeline.errors import RequestError
from pipeline.run_dir import lock_run_dir

ROOT = Path(__file__).resolve().parents[3]


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


def test_the_lock_of_a_killed_process_is_free_at_once(run_dir):
    program = f"""
import os
from pipeline.run_dir import lock_run_dir
from pipeline.store.path import run_path
lock_run_dir(run_path({str(run_dir)!r}))
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (run_dir / ".lock").exists()
    began = time.monotonic()
    lock_run_dir(run_dir).close()
    assert time.monotonic() - began < run_lock._LEASE_S / 4


def elsewhere(run_dir, renewals=1):
    value = {"owner": "other", "host": "far", "process": ["boot", "pid:[1]", "7", "99"], "renewals": renewals}
    (run_dir / ".lock").write_bytes(json.dumps(value).encode())


def test_a_holder_on_another_machine_lives_as_long_as_it_renews(run_dir, monkeypatch):
    monkeypatch.setattr(run_lock, "_LEASE_S", 1.0)
    monkeypatch.setattr(run_lock, "_POLL_S", 0.05)
    elsewhere(run_dir)
    threading.Timer(0.3, lambda: elsewhere(run_dir, 2)).start()
    with pytest.raises(RequestError, match=r"another process is training there \(host far, process 7\)"):
        lock_run_dir(run_dir)
    # It renews no more.
    lock_run_dir(run_dir).close()


def test_a_holder_whose_lock_was_taken_learns_of_it(run_dir, monkeypatch):
    monkeypatch.setattr(run_lock, "_RENEW_S", 0.05)
    lost = threading.Event()
    lock = run_lock.ObjectLock(run_dir / ".lock", lost=lost.set)
    elsewhere(run_dir)
    assert lost.wait(10)
    lock.close()
    assert (run_dir / ".lock").exists()
