"""Manifests and media on an object store: a real S3 server on this machine, spoken to over HTTP."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow.fs
import pytest

from pipeline.data.importers import import_layout
from pipeline.data.manifest import Manifest, _object_store, resolve_filesystem
from pipeline.data.media.errors import Reject
from pipeline.data.media.storage import read_bytes
from pipeline.data.sources import MediaSource
from pipeline.errors import DataError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store():
    """The URI of an empty bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    patch = pytest.MonkeyPatch()
    for name, value in {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        patch.setenv(name, value)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=2)
            break
        except OSError:
            assert server.poll() is None
            time.sleep(0.2)
    request = urllib.request.Request(f"{url}/bucket", method="PUT")
    urllib.request.urlopen(request, timeout=10)
    yield "s3://bucket"
    patch.undo()
    server.terminate()
    server.wait()


def upload(folder: Path, uri: str) -> None:
    filesystem, path = resolve_filesystem(uri)
    pyarrow.fs.copy_files(str(folder), path, destination_filesystem=filesystem)


def test_a_manifest_and_its_media_decode_as_on_disk(store, toy_corpus, toy_recipe):
    from pipeline import recipe as recipes

    upload(toy_corpus / "moving_digits", f"{store}/moving")
    data_set = recipes.from_dict(toy_recipe).data_set_specs()["moving"]
    here = MediaSource(data_set, modalities=("video", "audio"))
    there = MediaSource(data_set, modalities=("video", "audio"), manifest=f"{store}/moving/train.parquet")
    assert there.num_rows == here.num_rows
    for row in (0, 3):
        a, b = here.clip(row), there.clip(row)
        assert (a.id, a.text, a.labels) == (b.id, b.text, b.labels)
        np.testing.assert_array_equal(a.video, b.video)
        np.testing.assert_array_equal(a.audio, b.audio)
    assert there.where(0).startswith("s3://bucket/moving/videos/")


def test_tars_on_the_store_are_imported_and_read_by_offset(store, tmp_path):
    import io
    import tarfile

    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars/00.tar", "w") as tar:
        for name, content in (("1.jpg", b"first"), ("1.txt", b"one"), ("2.jpg", b"second"), ("2.txt", b"two")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    upload(tmp_path / "tars", f"{store}/tars")
    import_layout("webdataset", f"{store}/tars", tmp_path / "train.parquet")
    manifest = Manifest(str(tmp_path / "train.parquet"))
    rows = [manifest.row(i) for i in range(manifest.num_rows)]
    assert [r["text"] for r in rows] == [["one"], ["two"]]
    assert [read_bytes(r["image"]) for r in rows] == [b"first", b"second"]


def test_what_is_not_there_is_a_reject_and_a_store_that_is_gone_is_not(store, monkeypatch):
    with pytest.raises(Reject, match="missing_file"):
        read_bytes(f"{store}/nothing.png")
    monkeypatch.setattr("pipeline.data.media.storage._FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    _object_store.cache_clear()
    with pytest.raises(DataError, match="could not be read after"):
        read_bytes("s3://bucket/nothing.png")
    _object_store.cache_clear()
