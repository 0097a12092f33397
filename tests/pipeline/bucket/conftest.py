"""Buckets of servers on this machine."""

from __future__ import annotations

import pytest

from pipeline.store import objects
from pipeline.store.objects import open_store
from pipeline.store.path import run_path
from tests.gcs_server import GcsServer
from tests.s3_server import S3Server, StrictS3


@pytest.fixture(params=["s3", "gs"])
def scheme(request) -> str:
    """Of the store: a test runs on both, unless it names one."""
    return request.param


@pytest.fixture
def server(scheme, tmp_path, monkeypatch):
    root = tmp_path / "store"
    server = S3Server(root, edited=False) if scheme == "s3" else GcsServer(root)
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
    if server.scheme != "s3":
        yield
        return
    with StrictS3(server) as strict:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{strict.address}")
        yield
        strict.shutdown()


@pytest.fixture
def run_dir(server):
    return run_path(f"{server.uri}/runs/pets")


@pytest.fixture
def few_retries(monkeypatch):
    monkeypatch.setattr(objects, "_RETRIES", {"max_retries": 2, "initial_delay": "10ms", "max_delay": "10ms"})
