"""Paths, files and logs in a bucket: a real S3 server of this machine, also away, or not the one asked for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.errors import RequestError
from pipeline.store import log
from pipeline.store.log import open_log
from pipeline.store.objects import StoreError
from pipeline.store.path import ObjectPath, run_path
from pipeline.store.whole_listing import whole_listing
from pipeline.train.quarantine import journal_files
from pipeline.train.telemetry.step_log import StepLog

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("uri", ["ftp://host/run", "s3a://bucket/run", "file:///run", "hdfs://name/run", "http://a/b"])
def test_other_schemes_are_refused(uri):
    with pytest.raises(RequestError, match=r"--run-dir .*: expected a folder, s3://BUCKET/PATH or gs://BUCKET/PATH"):
        run_path(uri)


@pytest.mark.parametrize("rest", ["", "bucket", "bucket/", "b/run", "UPPER/run", "bucket/a/../b", "bucket/run?x=1"])
def test_names_that_are_no_run_directory_are_refused(rest):
    with pytest.raises(RequestError, match="expected s3://BUCKET/PATH"):
        run_path(f"s3://{rest}")


def test_credentials_in_a_uri_are_refused_and_not_shown():
    with pytest.raises(RequestError, match="credentials never belong in a URI") as refused:
        run_path("s3://AKIA:hush@bucket/run")
    assert "hush" not in str(refused.value) and "AKIA" not in str(refused.value)


def test_a_path_is_itself_however_it_is_made():
    path = run_path("gs://bucket/runs/pets")
    assert str(path / "a" / "b.json") == f"{path}/a/b.json" == "gs://bucket/runs/pets/a/b.json"
    assert isinstance(path / "a", ObjectPath) and (path / "a").key == "runs/pets/a"
    assert run_path(str(path)) == path and path.absolute() == path == (path / "a").parent and path.name == "pets"
    assert run_path("runs/pets") == Path("runs/pets")


def test_files_are_whole_objects(server, run_dir):
    assert not run_dir.exists() and not run_dir.is_dir() and list(run_dir.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        (run_dir / "config.yaml").read_bytes()
    (run_dir / "config.yaml").write_text("é: 1\n")
    (run_dir / "folder" / "a b.json").write_bytes(b"{}")
    run_path(f"{run_dir}hop").write_text("another")
    assert (run_dir / "config.yaml").is_file() and (run_dir / "folder").is_dir() and not run_dir.is_file()
    assert sorted(p.name for p in run_dir.iterdir()) == ["config.yaml", "folder"]
    assert (run_dir / "config.yaml").read_text() == "é: 1\n" and run_dir.names() == ["config.yaml", "folder/a b.json"]
    (run_dir / "folder").rename(run_dir / "folder.damaged")
    assert server.files() == ["config.yaml", "folder.damaged/a b.json"]
    (run_dir / "config.yaml").unlink()
    assert not (run_dir / "config.yaml").exists()


def test_a_log_grows_over_segments_and_is_cut_back(server, run_dir, monkeypatch):
    monkeypatch.setattr(log, "_SEGMENT_BYTES", 100)
    path, expected = run_dir / "metrics.jsonl", b""
    steps = StepLog(path, keep_steps=0)
    for step in range(1, 41):
        steps.write({"step": step})
        steps.sync()
        expected += json.dumps({"step": step}).encode() + b"\n"
    assert path.read_bytes() == expected and path.is_file() and not path.is_dir()
    # One of 100 bytes at least holds more than five lines.
    assert 4 <= len(server.files()) <= 7
    again = StepLog(path, keep_steps=17)
    assert again.last_step == 40
    again.write({"step": 18})
    again.close()
    with path.open() as lines:
        assert [json.loads(line)["step"] for line in lines] == list(range(1, 19))
    assert StepLog(path, keep_steps=0).last_step == 18 and not path.exists()


def test_a_log_of_the_longest_run_has_few_objects_and_sends_little(monkeypatch):
    """10^6 lines of 600 bytes, put at every 50th: by arithmetic of the class itself, with a store that only counts."""
    sent, keys = 0, set()

    class Counting:
        def put(self, key, content):
            nonlocal sent
            sent += len(content)
            keys.add(key)

        def names(self, prefix):
            return []

    monkeypatch.setattr(ObjectPath, "store", Counting())
    path = run_path("s3://bucket/run") / "metrics.jsonl"
    long_log, line = open_log(path), b"x" * 599 + b"\n"
    for _ in range(20_000):
        long_log.append(line * 50)
        long_log.sync()
    assert len(keys) <= 600e6 / (1 << 18) + 1
    # Each flush sends half a segment on average beside what is new.
    assert sent <= 600e6 + 20_000 * (1 << 18)


def test_what_was_acknowledged_survives_a_kill(server, run_dir):
    program = f"""
import os
from pipeline.store.path import run_path
from pipeline.store.log import open_log
log = open_log(run_path({str(run_dir)!r}) / "quarantine" / "rank-0.jsonl")
log.append(b"one\\n"); log.append(b"two\\n"); log.sync(); log.append(b"three\\n")
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    (path,) = journal_files(run_dir)
    assert path.read_bytes() == b"one\ntwo\n"
    more = open_log(path)
    more.append(b"four\n")
    more.close()
    assert path.read_bytes() == b"one\ntwo\nfour\n"


def test_a_store_that_is_away_for_a_moment_is_waited_for(server, run_dir):
    server.stop()
    began = time.monotonic()
    back = threading.Timer(1.0, server.start)
    back.start()
    (run_dir / "a").write_bytes(b"1")
    assert time.monotonic() - began >= 1.0 and server.files() == ["a"]
    back.join()


def test_a_store_that_stays_away_is_an_error_after_bounded_tries(server, run_dir, few_retries):
    server.stop()
    with pytest.raises(StoreError, match=f"{server.uri}: .*attempts failed") as failed:
        (run_dir / "a").write_bytes(b"1")
    assert not failed.value.refused
    server.start()


def test_a_wrong_bucket_is_refused_at_once(server):
    with pytest.raises(StoreError, match="://nobucket: no such bucket") as refused:
        run_path(f"{server.scheme}://nobucket/run").names()
    assert refused.value.refused


@pytest.mark.parametrize("scheme", ["gs"])
def test_a_listing_that_is_refused_is_no_empty_folder(server, run_dir):
    (run_dir / "a").write_bytes(b"1")
    server.control(unlisted=2)
    for _ in range(2):
        with pytest.raises(StoreError, match="access denied"):
            run_dir.names()
    assert run_dir.names() == ["a"]


@pytest.mark.parametrize("scheme", ["gs"])
def test_a_listing_beside_a_request_that_failed_is_made_again(server, run_dir):
    (run_dir / "a").write_bytes(b"1")
    made = []

    def make() -> list[str]:
        made.append(None if made else run_dir.store.get("missing"))
        return run_dir.names()

    assert whole_listing(make) == ["a"] and len(made) == 2


@pytest.mark.parametrize("scheme", ["gs"])
def test_an_object_that_changes_more_often_than_allowed_is_put_later(server, run_dir):
    server.control(limited=1)
    lines = open_log(run_dir / "metrics.jsonl")
    for step in range(3):
        lines.append(b"%d\n" % step)
        lines.sync()
    assert (run_dir / "metrics.jsonl").read_bytes() == b"0\n1\n2\n" and server.control()["refused"]


@pytest.mark.parametrize("scheme", ["gs"])
def test_a_token_that_is_refused_is_never_shown(server, run_dir):
    """In a process of its own: tensorstore reads the variable once."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "evaluate.py"), "--run", str(run_dir)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "GOOGLE_AUTH_TOKEN_FOR_TESTING": "wrong-token"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and f"error: --run {run_dir}: {server.uri}: access denied" in done.stderr
    assert "wrong-token" not in done.stderr


@pytest.mark.parametrize("scheme", ["s3"])
def test_wrong_credentials_are_refused_at_once_and_never_shown(server, run_dir, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    with pytest.raises(StoreError, match="access denied") as refused:
        run_dir.names()
    assert refused.value.refused and "wrong-secret" not in str(refused.value)
