"""Manifests and media on object stores: servers of S3 and of Google's protocol on this machine, spoken to over HTTP."""

from __future__ import annotations

import http.server
import importlib
import io
import os
import sys
import tarfile
import threading
import time
import types
from datetime import timedelta
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from pipeline.data import row_groups, row_table
from pipeline.data.importers import import_layout
from pipeline.data.manifest import Manifest
from pipeline.data.media import storage
from pipeline.data.media.clip import decode_media
from pipeline.data.media.errors import Reject
from pipeline.data.media.storage import read_bytes, resolve_filesystem
from pipeline.errors import DataError, RequestError
from tests.gcs_server import GcsServer
from tests.s3_server import S3Server

pytestmark = pytest.mark.slow

# Nothing that a key of a store may hold is special: neither to a URI, nor to a tar's members.
ODD_NAMES = ("a b.png", "100%.png", "a%20c.png", "no#1.png", "what?.png", "photo.php?id=5.png", "é ü.png", "1+1=2&.png")


# For tests of what depends on the store; the others run on S3.
both = pytest.mark.parametrize("scheme", ["s3", "gs"])


@pytest.fixture
def scheme() -> str:
    return "s3"


@pytest.fixture
def store(scheme, tmp_path, monkeypatch):
    root = tmp_path / "store"
    store = S3Server(root, edited=True) if scheme == "s3" else GcsServer(root)
    # Google's client is as impatient as Amazon's is by itself.
    monkeypatch.setattr(storage, "_GCS_PATIENCE", "retry_limit_seconds=2")
    store.use(monkeypatch)
    storage._object_store.cache_clear()
    store.start()
    yield store
    store.stop()
    storage._object_store.cache_clear()


@pytest.fixture
def waits(monkeypatch):
    """The pauses between tries, which are not waited for."""
    found = []
    monkeypatch.setattr(storage, "time", types.SimpleNamespace(sleep=found.append))
    return found


@both
@pytest.mark.parametrize(("name", "modalities"), [("digits", ["image"]), ("moving", ["video", "audio"])])
def test_a_manifest_and_its_media_decode_as_on_disk(store, toy_corpus, toy_recipe, name, modalities):
    from pipeline import recipe as recipes
    from pipeline.recipe import specs

    data_set = specs.data_set_specs(recipes.from_dict(toy_recipe))[name]
    local = Path(data_set.manifest)
    store.put_folder(local.parent, "set")
    here, there = Manifest(str(local)), Manifest(f"{store.uri}/set/{local.name}")
    assert there.num_rows == here.num_rows > 3 and there.schema == here.schema
    for index in (0, 3):
        row, far = here.row(index), there.row(index)
        assert {k: v for k, v in row.items() if k not in ("image", "video")} == {
            k: v for k, v in far.items() if k not in ("image", "video")
        }
        assert far[modalities[0]].startswith(f"{store.uri}/set/")
        for modality in modalities:
            expected = decode_media(row, data_set, modality)
            assert expected.size
            np.testing.assert_array_equal(decode_media(far, data_set, modality), expected)


@both
def test_a_folder_of_manifests(store, tmp_path, write_manifest):
    for number in (2, 1):
        write_manifest(tmp_path / f"parts/{number}.parquet", [{"id": str(number), "image": "a b.png"}])
    store.put_folder(tmp_path / "parts", "parts")
    manifest = Manifest(f"{store.uri}/parts/")
    assert list(manifest.iter_column("id")) == ["1", "2"]
    store.put("parts/a b.png", b"pixels")
    assert read_bytes(manifest.row(1)["image"]) == b"pixels"


def test_rows_exchanged_in_place_on_the_store_are_found(store, monkeypatch):
    """By the time that opening an object tells: size and footer are the same."""
    monkeypatch.setattr(row_table, "_IN_MEMORY_ROWS", 0)
    monkeypatch.setattr(row_table, "_MAX_COPIED_ROWS", 0)

    def put(*numbers: int) -> str:
        file = io.BytesIO()
        rows = pa.table({"id": [f"row-{n}" for n in numbers]})
        pq.write_table(rows, file, compression="none", use_dictionary=False)
        return store.put("set/m.parquet", file.getvalue())

    known = Manifest(uri := put(0, 1, 2, 3)).index
    assert [Manifest(uri, known=known).row(n)["id"] for n in (1, 2)] == ["row-1", "row-2"]
    put(0, 2, 1, 3)
    later = time.time() + 10
    os.utime(store.bucket / "set/m.parquet", (later, later))
    # Nothing is left of what was read before.
    monkeypatch.setattr(row_groups, "_CACHE", row_groups.GroupCache())
    with pytest.raises(RequestError, match=r"set/m\.parquet: the file is not the one that the run began with"):
        Manifest(uri, known=known).row(2)


def write_tar(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


@both
def test_tars_on_the_store_are_imported_and_read_by_offset(store, tmp_path):
    tar = write_tar({"1.jpg": b"first", "1.txt": b"one", "2.jpg": b"second", "2.txt": b"two"})
    store.put("tars/no 1#2.tar", tar)
    import_layout("webdataset", f"{store.uri}/tars", tmp_path / "train.parquet")
    manifest = Manifest(str(tmp_path / "train.parquet"))
    rows = [manifest.row(i) for i in range(manifest.num_rows)]
    assert [r["text"] for r in rows] == [["one"], ["two"]]
    assert [read_bytes(r["image"]) for r in rows] == [b"first", b"second"]
    store.put("tars/no 1#2.tar", tar[:600])
    with pytest.raises(Reject, match="not_decodable: the tar has 600 bytes"):
        read_bytes(rows[1]["image"])


@both
def test_files_on_the_store_are_imported_whatever_their_names(store, tmp_path):
    for name in ODD_NAMES:
        store.put(f"classes/cat {name[0]}/{name}", name.encode())
    done = import_layout("class_folders", f"{store.uri}/classes", tmp_path / "train.parquet")
    assert not done.skipped
    manifest = Manifest(str(tmp_path / "train.parquet"))
    rows = [manifest.row(i) for i in range(manifest.num_rows)]
    assert sorted(read_bytes(r["image"]).decode() for r in rows) == sorted(ODD_NAMES)
    assert all(r["labels"] == [f"cat {r['image'].rpartition('/')[2][0]}"] for r in rows)


def test_a_store_is_opened_once(store):
    first, path = resolve_filesystem(f"{store.uri}/a/b.png")
    assert path == "bucket/a/b.png" and resolve_filesystem(f"{store.uri}/c.png")[0] is first
    other, path = resolve_filesystem("s3://bucket/c.png?region=eu-west-1&scheme=http")
    assert path == "bucket/c.png" and other.region == "eu-west-1" and first.region == "us-east-1"


@both
def test_what_is_not_on_the_store_is_a_reject(store, waits):
    store.put("empty.png", b"")
    for key, reason in (("none.png", "missing_file"), ("a//b.png", "missing_file"), ("empty.png", "empty_file")):
        with pytest.raises(Reject, match=reason):
            read_bytes(f"{store.uri}/{key}")
    store.put("folder/a.png", b"a")
    with pytest.raises(Reject, match="missing_file"):
        read_bytes(f"{store.uri}/folder")
    assert not waits


@both
def test_a_wrong_bucket_is_no_reject(store, waits):
    with pytest.raises(DataError, match=r"bucket 'bucked' of bucked/a\.png does not exist"):
        read_bytes(f"{store.scheme}://bucked/a.png")
    with pytest.raises(RequestError, match=r"manifest ..://bucked/m\.parquet: expected a Parquet file or a folder"):
        Manifest(f"{store.scheme}://bucked/m.parquet")
    for name in ("a bucket", "bücket"):
        with pytest.raises(RequestError, match=r"storage: .*URI"):
            read_bytes(f"{store.scheme}://{name}/a.png")
    assert not waits


def deny_s3(store, monkeypatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")


def deny_google(store, monkeypatch) -> None:
    store.control(denied=1)


def break_user(store, monkeypatch) -> None:
    (store.bucket.parent / "user.json").write_text('{"type": "authorized_user", "client_id": "test"}')


@pytest.mark.parametrize(("scheme", "deny"), [("s3", deny_s3), ("gs", deny_google), ("gs", break_user)])
def test_denied_access_is_no_reject(store, deny, waits, monkeypatch, tmp_path, write_manifest):
    manifest = write_manifest(tmp_path / "m.parquet", [{"id": "0", "image": "a.png"}])
    store.put("m.parquet", Path(manifest).read_bytes())
    path = store.put("a.png", b"pixels")
    deny(store, monkeypatch)
    storage._object_store.cache_clear()
    message = r"storage: ..://bucket/.+ could not be read after 5 tries: access denied, .+ check credentials.+: "
    for read in (read_bytes, Manifest):
        for uri in (path, f"{store.uri}/none.png", f"{store.uri}/{Path(manifest).name}"):
            with pytest.raises(DataError, match=message) as caught:
                read(uri)
            assert "\n" not in str(caught.value)


def test_a_store_that_is_gone_stops_the_run(store, waits, monkeypatch):
    path = store.put("a.png", b"pixels")
    assert read_bytes(path) == b"pixels"
    store.stop()
    monkeypatch.setattr(storage, "_ATTEMPTS", 2)
    with pytest.raises(DataError, match=r"storage: ..://bucket/a\.png could not be read after 2 tries: .*connect"):
        read_bytes(path)
    assert len(waits) == 1


@both
def test_a_store_that_comes_back_is_waited_for(store, monkeypatch, tmp_path, write_manifest):
    """Its own client gives up after some seconds; then it starts again, on the same port."""
    store.put("a.png", b"pixels")
    store.put("m.parquet", Path(write_manifest(tmp_path / "m.parquet", [{"id": "0", "image": "a.png"}])).read_bytes())
    manifest = Manifest(f"{store.uri}/m.parquet")
    for read, expected in (
        (lambda: read_bytes(f"{store.uri}/a.png"), b"pixels"),
        (lambda: manifest.row(0), {"id": "0", "image": f"{store.uri}/a.png"}),
    ):
        store.stop()
        waits = []
        sleep = types.SimpleNamespace(sleep=lambda s, w=waits: (w.append(s), store.start()))
        monkeypatch.setattr(storage, "time", sleep)
        assert read() == expected
        assert len(waits) == 1


class _Web(http.server.BaseHTTPRequestHandler):
    """Answers /CODE/... with that status."""

    def do_GET(self):
        self.send_response(int(self.path.split("/")[1]))
        self.send_header("Content-Length", "6")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(b"pixels")

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def test_over_http_only_the_servers_word_makes_a_reject(waits):
    pytest.importorskip("aiohttp")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Web) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        web = f"http://127.0.0.1:{server.server_port}"
        assert read_bytes(f"{web}/200/a.png") == b"pixels"
        for code in (404, 410):
            with pytest.raises(Reject, match="missing_file"):
                read_bytes(f"{web}/{code}/a.png")
        assert not waits
        for code in (403, 503):
            with pytest.raises(DataError, match=f"could not be read after 5 tries: .*{code}"):
                read_bytes(f"{web}/{code}/a.png")
        server.shutdown()
    with pytest.raises(DataError, match=r"could not be read after 5 tries: .*Cannot connect"):
        read_bytes(f"{web}/200/a.png")


def test_google_cloud_storage_is_opened_once_and_not_asked_for_long(waits, monkeypatch):
    first, path = resolve_filesystem("gs://anonymous@bucket/a b.png")
    assert isinstance(first, pyarrow.fs.GcsFileSystem) and path == "bucket/a b.png"
    _, (options,) = first.__reduce__()
    assert options["retry_time_limit"] == timedelta(seconds=30)
    assert resolve_filesystem("gs://anonymous@bucket/c.png")[0] is first
    monkeypatch.setattr(storage, "_GCS_PATIENCE", "retry_limit_seconds=1")
    monkeypatch.setattr(storage, "_ATTEMPTS", 2)
    began = time.monotonic()
    with pytest.raises(DataError, match=r"could not be read after 2 tries: .*Could not connect"):
        read_bytes("gs://anonymous@bucket/a.png?scheme=http&endpoint_override=127.0.0.1:9")
    # Each try would take half a minute.
    assert time.monotonic() - began < 55


def test_a_missing_package_is_named(monkeypatch, waits):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "hf", raising=False)
    fsspec.register_implementation("far", "no_such_package.Far", errtxt="Install no_such_package to go far")
    for uri, advice in (
        ("hf://datasets/some/set/train.parquet", ".*huggingface_hub"),
        ("far://away/train.parquet", r"Install no_such_package to go far \(No module named 'no_such_package'\)"),
        ("nowhere://train.parquet", "Protocol not known: nowhere"),
    ):
        for read in (read_bytes, Manifest):
            with pytest.raises(RequestError, match=f"storage: {uri} cannot be opened: {advice}"):
                read(uri)
    assert not waits
