"""Rows by number from Parquet of any layout: in memory, from a copy, or where they lie; and what is damaged."""

import dataclasses
import gc
import io
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import columns, parquet_files, row_groups, row_table
from pipeline.data.columns import Fingerprint, normalise
from pipeline.data.manifest import Manifest, copy_rows
from pipeline.data.media import storage
from pipeline.data.media.process import DecodeLimits
from pipeline.data.parquet_files import ParquetFiles
from pipeline.data.row_groups import RowGroups
from pipeline.data.row_table import RowTable
from pipeline.data.sources import MediaSource
from pipeline.errors import DataError, RequestError
from pipeline.facts import facts_of
from pipeline.plan import _check_data_set
from pipeline.preprocess import _checked_job

NUM_ROWS = 10_000
# Options of a file whose size and footer do not tell the order of its rows.
PLAIN = {"compression": "none", "use_dictionary": False}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IMP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "manifests"


@pytest.fixture
def copied(monkeypatch):
    """Manifests of any size get a copy."""
    monkeypatch.setattr(row_table, "_IN_MEMORY_ROWS", 0)


@pytest.fixture
def too_large(monkeypatch, copied):
    """Manifests of any size are too large for a copy."""
    monkeypatch.setattr(row_table, "_MAX_COPIED_ROWS", 0)


def table(start: int = 0, stop: int = NUM_ROWS, **changed) -> pa.Table:
    numbers = range(start, stop)
    columns = {
        "id": [f"row-{i}" for i in numbers],
        "image": [f"{i}.png" for i in numbers],
        "text": [None if i % 7 == 3 else [f"text {i}"] * (i % 3) for i in numbers],
        "labels": [["a"] if i % 2 else ["b", "c"] for i in numbers],
        "start_s": [None if i % 5 else i / 4 for i in numbers],
    }
    return pa.table(columns | changed)


def write(path, rows: pa.Table | None = None, **options) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table() if rows is None else rows, path, **options)
    return str(path)


def wanted(path, index: int) -> dict:
    (row,) = table(index, index + 1).to_pylist()
    return row | {"image": f"{path.parent}/{row['image']}"}


def assert_rows(path, manifest: Manifest) -> None:
    for index in (0, NUM_ROWS - 1, 4095, 4096, *np.random.default_rng(0).integers(0, NUM_ROWS, 50).tolist()):
        assert manifest.row(index) == wanted(path, index)
    assert list(manifest.iter_column("id")) == [f"row-{i}" for i in range(NUM_ROWS)]


@pytest.mark.parametrize("row_group_size", [100, 1 << 20])
def test_rows_in_memory(tmp_path, cache, row_group_size):
    path = tmp_path / "m.parquet"
    assert_rows(path, Manifest(write(path, row_group_size=row_group_size)))
    assert not cache.exists()


@pytest.mark.parametrize("row_group_size", [100, 5000, 1 << 20])
def test_rows_from_a_copy(tmp_path, cache, copied, row_group_size):
    path = tmp_path / "m.parquet"
    assert_rows(path, Manifest(write(path, row_group_size=row_group_size)))
    assert len(list(cache.glob("*.arrow"))) == 1


def test_rows_where_they_lie(tmp_path, cache, too_large):
    path = tmp_path / "set" / "0.parquet"
    write(path, table(0, 1), row_group_size=100)
    write(path.with_name("1.parquet"), table(1, 9000), row_group_size=700)
    write(path.with_name("2.parquet"), table(9000), row_group_size=100)
    manifest = Manifest(str(path.parent))
    assert_rows(path, manifest)
    assert isinstance(manifest._rows, RowGroups) and not list(cache.glob("*.arrow"))
    manifest.require({"id": "a task"})


def test_of_rows_where_they_lie_sizes_are_read_once_a_machine(tmp_path, cache, too_large, monkeypatch):
    paths = [tmp_path / "set" / f"{n}.parquet" for n in range(3)]
    for n, path in enumerate(paths):
        write(path, table(n * 100, (n + 1) * 100))
    fingerprint, read = Manifest(str(paths[0].parent)).fingerprint, []
    inner = ParquetFiles._read
    monkeypatch.setattr(
        ParquetFiles, "_read", lambda self, path, *args, **kw: read.append(path) or inner(self, path, *args, **kw)
    )
    again = Manifest(str(paths[0].parent))
    assert (again.num_rows, again.fingerprint) == (300, fingerprint)
    assert set(read) <= {str(paths[0])} and again.row(207)["id"] == "row-207"
    write(paths[1], table(0, 50))
    other = Manifest(str(paths[0].parent))
    assert other.num_rows == 250 and other.fingerprint["footers"] != fingerprint["footers"]
    # What a kill or a full disk left there is made again.
    for kept in cache.glob("*.json"):
        kept.write_text("[[")
    assert Manifest(str(paths[0].parent)).fingerprint == other.fingerprint


# --- what a run's processes open ---


def three_files(tmp_path, **options) -> str:
    for n in range(3):
        write(tmp_path / "set" / f"{n}.parquet", table(n * 1000, (n + 1) * 1000), row_group_size=100, **options)
    return str(tmp_path / "set")


def opened_files(monkeypatch) -> list[str]:
    """The names of files that are opened from now on; listing a folder fails."""
    read, inner = [], ParquetFiles._read
    monkeypatch.setattr(ParquetFiles, "_list", None)
    monkeypatch.setattr(
        ParquetFiles, "_read", lambda self, p, *args, **kw: read.append(Path(p).name) or inner(self, p, *args, **kw)
    )
    return read


def test_with_the_runs_index_a_process_opens_only_the_files_of_its_rows(tmp_path, cache, too_large, monkeypatch):
    """On a machine that has never seen the manifest; columns that the task does not need are not read."""
    known = pickle.loads(pickle.dumps(Manifest(folder := three_files(tmp_path)).index))
    assert len(repr(known)) < 100
    monkeypatch.setenv("IMP_CACHE", str(tmp_path / "elsewhere"))
    read = opened_files(monkeypatch)
    groups, inner = [], ParquetFiles.group
    monkeypatch.setattr(
        ParquetFiles, "group", lambda self, p, n, names: groups.append((n, names)) or inner(self, p, n, names)
    )
    manifest = Manifest(folder, known=known, columns=("id", "image", "labels"))
    assert manifest.num_rows == 3000 and manifest.fingerprint == known.fingerprint and not read
    assert manifest.row(1950) == {"id": "row-1950", "image": f"{folder}/1950.png", "labels": ["b", "c"]}
    assert manifest.row(1949)["id"] == "row-1949"
    # The footer of the file and its row group; of the first file the footer, for the names of the columns.
    assert sorted(read) == ["0.parquet", "1.parquet", "1.parquet"]
    assert groups == [(9, ["id", "image", "labels"])]
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("change", ["size", "footer"])
def test_a_file_exchanged_since_the_run_began_is_found_when_it_is_opened(tmp_path, too_large, change):
    folder = three_files(tmp_path, compression="none", use_dictionary=False)
    known, path = Manifest(folder).index, tmp_path / "set" / "1.parquet"
    size = path.stat().st_size
    ids = ["row-9500" if n == 1500 else f"row-{n}" for n in range(1000, 2000)]
    rows = table(1000, 2000, id=ids) if change == "footer" else table(1000, 2001)
    write(path, rows, row_group_size=100, compression="none", use_dictionary=False)
    assert (path.stat().st_size == size) == (change == "footer")
    manifest = Manifest(folder, known=known)
    assert manifest.row(7)["id"] == "row-7"
    with pytest.raises(
        RequestError, match=r"1\.parquet: the file is not the one that the run began with; all machines"
    ):
        manifest.row(1500)


def exchange(tmp_path, *, seconds: int) -> None:
    """Two rows of the second file change places, in a file of the same size and footer, with another time."""
    path = tmp_path / "set" / "1.parquet"
    before, footer = path.read_bytes(), pq.read_metadata(path)
    rows = table(1000, 2000).take([1, 0, *range(2, 500), 551, *range(501, 551), 500, *range(552, 1000)])
    write(path, rows, row_group_size=100, **PLAIN)
    assert path.stat().st_size == len(before) and path.read_bytes() != before
    length = int.from_bytes(before[-8:-4], "little")
    assert path.read_bytes()[-8 - length :] == before[-8 - length :] and pq.read_metadata(path).equals(footer)
    now = time.time_ns() + seconds * 10**9
    os.utime(path, ns=(now, now))


def test_rows_exchanged_in_place_are_found_although_size_and_footer_are_the_same(tmp_path, too_large):
    """Also by a process that has the file's footer at hand."""
    folder = three_files(tmp_path, **PLAIN)
    known = Manifest(folder).index
    opened = Manifest(folder, known=known)
    assert opened.row(1950)["id"] == "row-1950"
    exchange(tmp_path, seconds=10)
    for manifest in (opened, Manifest(folder, known=known)):
        with pytest.raises(RequestError, match=r"1\.parquet: the file is not the one that the run began with"):
            manifest.row(1500)
        assert manifest.row(2500)["id"] == "row-2500"


def test_a_machines_own_earlier_copy_of_the_files_may_have_another_time(tmp_path, too_large):
    known = Manifest(folder := three_files(tmp_path)).index
    os.utime(tmp_path / "set" / "1.parquet", (1000, 1000))
    assert Manifest(folder, known=known).row(1500)["id"] == "row-1500"


@pytest.mark.parametrize("kind", ["in place", "copied"])
def test_a_machine_without_the_manifest_says_so_in_one_line(tmp_path, pauses, monkeypatch, kind, copied):
    monkeypatch.setattr(row_table, "_MAX_COPIED_ROWS", 0 if kind == "in place" else NUM_ROWS)
    known = Manifest(folder := three_files(tmp_path)).index
    monkeypatch.setenv("IMP_CACHE", str(tmp_path / "elsewhere"))
    shutil.rmtree(folder)
    message = (
        rf"manifest {folder}.*: not found on {socket.gethostname()}, although the run began with it; every machine"
    )
    with pytest.raises(DataError, match=message) as caught:
        Manifest(folder, known=known).row(1500)
    assert "\n" not in str(caught.value)


def test_a_machine_that_only_decodes_reads_a_large_copied_manifest_in_place(
    tmp_path, copied, make_data_set, monkeypatch
):
    monkeypatch.setattr(row_table, "_READ_IN_PLACE_ROWS", 1000)
    known = Manifest(folder := three_files(tmp_path)).index
    again = Manifest(folder).index
    assert again.files == known.files and known.copied
    cache = tmp_path / "elsewhere" / "manifests"
    monkeypatch.setenv("IMP_CACHE", str(cache.parent))
    read = opened_files(monkeypatch)
    manifest = Manifest(folder, known=known, columns=("id", "labels"))
    assert manifest.fingerprint == known.fingerprint and not read
    assert manifest.row(1950)["id"] == "row-1950" and not cache.exists()
    assert isinstance(manifest._rows, RowGroups) and set(read) == {"0.parquet", "1.parquet"}
    # One that trains has the copy, and its decode processes use it.
    copy_rows([dataclasses.replace(make_data_set(folder), index=known)])
    copy = Manifest(folder, known=known)
    assert isinstance(copy._rows, RowTable) and copy.row(1950)["id"] == "row-1950"


def test_large_row_groups_are_never_read_in_place_on_a_machine_that_can_copy(tmp_path, copied, monkeypatch):
    monkeypatch.setattr(row_table, "_READ_IN_PLACE_ROWS", 1000)
    monkeypatch.setattr(row_table, "_READ_IN_PLACE_GROUP", 99)
    known = Manifest(folder := three_files(tmp_path)).index
    assert known.files == b""
    monkeypatch.setenv("IMP_CACHE", str(tmp_path / "elsewhere"))
    assert isinstance(Manifest(folder, known=known)._rows, RowTable)


def test_a_file_that_grows_between_two_runs_is_another_manifest(tmp_path, too_large):
    folder = three_files(tmp_path)
    before = Manifest(folder)
    assert before.num_rows == 3000
    write(tmp_path / "set" / "2.parquet", table(2000, 3001), row_group_size=100)
    after = Manifest(folder)
    assert after.num_rows == 3001 and after.row(3000)["id"] == "row-3000" and after.fingerprint != before.fingerprint


def test_a_file_that_is_cut_short_during_a_run_is_found(tmp_path, too_large):
    known = Manifest(folder := three_files(tmp_path)).index
    path = tmp_path / "set" / "1.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RequestError, match=r"1\.parquet: the file is not the one that the run began with"):
        Manifest(folder, known=known).row(1500)


@pytest.mark.parametrize("ids", [[], ["a", "b", "c"], ["z", "y", "x", "x"], ["same"] * 300])
@pytest.mark.parametrize("in_place", [False, True])
def test_rows_of_any_number_and_order(tmp_path, copied, monkeypatch, ids, in_place):
    """Row groups of one row, and empty ones at both ends and between."""
    monkeypatch.setattr(row_table, "_MAX_COPIED_ROWS", 0 if in_place else NUM_ROWS)
    rows = pa.table({"id": pa.array(ids, pa.string())})
    with pq.ParquetWriter(tmp_path / "m.parquet", rows.schema) as writer:
        for number in range(len(ids) + 1):
            writer.write_table(rows.slice(0, 0))
            writer.write_table(rows.slice(number, 1))
    if not ids:
        with pytest.raises(RequestError, match="expected rows, found none"):
            Manifest(str(tmp_path / "m.parquet"))
        return
    found = Manifest(str(tmp_path / "m.parquet"))
    other = Manifest(found.uri, known=pickle.loads(pickle.dumps(found.index)))
    for manifest in (found, other):
        assert [manifest.row(n)["id"] for n in range(len(ids))] == list(manifest.iter_column("id")) == ids


def test_a_copy_is_found_by_the_runs_name_for_it_without_a_look_at_the_files(tmp_path, cache, copied, monkeypatch):
    known = Manifest(folder := three_files(tmp_path)).index
    assert known.files == b""
    shutil.rmtree(folder)
    monkeypatch.setattr(parquet_files, "resolve_filesystem", None)
    manifest = Manifest(folder, known=known)
    assert manifest.fingerprint == known.fingerprint
    assert manifest.row(2999)["image"] == f"{folder}/2999.png"


def test_a_machine_with_other_rows_keeps_no_copy_under_the_runs_name(tmp_path, cache, copied, monkeypatch):
    folder = three_files(tmp_path)
    known = Manifest(folder).index
    monkeypatch.setenv("IMP_CACHE", str(tmp_path / "elsewhere"))
    path = tmp_path / "set" / "1.parquet"
    right = path.read_bytes()
    write(path, table(0, 1000))
    assert Manifest(folder, known=known).fingerprint != known.fingerprint
    path.write_bytes(right)
    again = Manifest(folder, known=known)
    assert again.fingerprint == known.fingerprint and again.row(1500)["id"] == "row-1500"


def test_small_manifests_have_no_index_and_are_read_by_each_process(tmp_path):
    assert Manifest(write(tmp_path / "m.parquet")).index is None


def test_few_footers_are_kept(tmp_path, too_large, monkeypatch):
    monkeypatch.setattr(parquet_files, "_KEPT_FOOTER_BYTES", 1)
    manifest = Manifest(three_files(tmp_path))
    assert [manifest.row(n)["id"] for n in (5, 1005, 2005, 5)] == ["row-5", "row-1005", "row-2005", "row-5"]
    assert len(manifest._source.files._footers) == 1


def test_parsed_footers_are_freed_without_the_garbage_collector(tmp_path, too_large, monkeypatch):
    """Of 10,000 files of 10^6 rows they took a process a gigabyte until it ran."""
    monkeypatch.setattr(parquet_files, "_KEPT_FOOTER_BYTES", 1)
    manifest = Manifest(three_files(tmp_path))
    assert manifest.row(5)["id"] == "row-5"

    def footers() -> int:
        # isinstance would ask what a weak reference of another test led to.
        return sum(type(found) is pq.FileMetaData for found in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        # Other tests of this process may have left theirs.
        before = footers()
        for number in range(30):
            manifest.row(100 * number)
        assert footers() <= before + 1
    finally:
        gc.enable()


def test_empty_row_groups_are_passed_over(tmp_path, too_large):
    path = tmp_path / "m.parquet"
    with pq.ParquetWriter(path, table().schema) as writer:
        for start, stop in ((0, 3), (3, 3), (3, NUM_ROWS)):
            writer.write_table(table().slice(start, stop - start))
    manifest = Manifest(str(path))
    assert_rows(path, manifest)
    assert manifest.fingerprint["num_rows"] == NUM_ROWS


def test_a_look_at_some_rows_is_one_at_pieces_from_all_over_the_manifest(tmp_path, copied, monkeypatch):
    copy, lies = (write(tmp_path / name, row_group_size=100) for name in ("copy.parquet", "lies.parquet"))

    def looked_at(path: str, max_rows: int) -> list[int]:
        batches = Manifest(path).batches(("id",), max_rows=max_rows)
        return [int(i.removeprefix("row-")) for batch in batches for i in batch.column(0).to_pylist()]

    assert looked_at(copy, NUM_ROWS) == list(range(NUM_ROWS)) and looked_at(copy, 1) == [0]
    # Two record batches of 4,096 rows, the second one the short last one of the manifest.
    assert looked_at(copy, 5000) == [*range(4096), *range(8192, 8192 + 904)]
    monkeypatch.setattr(row_table, "_MAX_COPIED_ROWS", 0)
    assert looked_at(lies, 250) == [*range(100), *range(4900, 5000), *range(9900, 9950)]
    # The number of requests is bounded, however many rows are asked for.
    monkeypatch.setattr(row_groups, "_MAX_SAMPLED_GROUPS", 2)
    assert looked_at(lies, 5000) == [*range(100), *range(9900, NUM_ROWS)]


def test_of_rows_where_they_lie_no_more_is_read_than_asked_for(tmp_path, too_large, monkeypatch):
    manifest, read = Manifest(write(tmp_path / "m.parquet", row_group_size=100)), []
    group = ParquetFiles.group
    monkeypatch.setattr(
        ParquetFiles,
        "group",
        lambda self, path, number, columns: read.append((number, columns)) or group(self, path, number, columns),
    )
    found = list(manifest.batches(("id",), max_rows=250))
    assert sum(map(len, found)) == 250 and found[0].schema.names == ["id"]
    assert read == [(0, ["id"]), (49, ["id"]), (99, ["id"])]


def test_large_row_groups_need_a_copy(tmp_path, too_large, monkeypatch):
    monkeypatch.setattr(row_groups, "_MAX_ROWS_PER_GROUP", 1000)
    manifest = Manifest(write(tmp_path / "m.parquet", row_group_size=NUM_ROWS))
    with pytest.raises(
        RequestError,
        match=r"groups of at most 1000 rows, found 10000; write .* row_group_size=4096",
    ):
        manifest.row(0)


# --- large row groups ---


def test_a_large_row_group_is_copied_in_bounded_pieces(tmp_path, copied, monkeypatch):
    """A short one is read at once. Pieces are bounded by bytes too: 10,000 rows of a list of some 15 KB in one case."""
    path = tmp_path / "m.parquet"
    sizes, inner = [], columns.normalise
    monkeypatch.setattr(row_table, "normalise", lambda piece, names: sizes.append(len(piece)) or inner(piece, names))
    monkeypatch.setattr(parquet_files, "_ROWS_PER_PIECE", 3000)
    assert_rows(path, Manifest(write(path, row_group_size=7000)))
    assert sizes == [3000, 3000, 1000, 3000]
    monkeypatch.setattr(parquet_files, "_PIECE_BYTES", 10_000)
    monkeypatch.setattr(ParquetFiles, "group", None)
    assert_rows(path, Manifest(write(path, row_group_size=NUM_ROWS)))
    group = pq.read_metadata(path).row_group(0)
    size = sum(group.column(n).total_uncompressed_size for n in range(group.num_columns))
    assert max(sizes[4:]) == 10_000 * NUM_ROWS // size < 1000


def test_storage_that_fails_inside_a_row_group_is_read_on_from_there(tmp_path, pauses, copied, monkeypatch):
    monkeypatch.setattr(parquet_files, "_ROWS_PER_PIECE", 1000)
    monkeypatch.setattr(parquet_files, "_BUFFER_BYTES", 1000)
    path = tmp_path / "m.parquet"
    manifest = Manifest(
        write(path, row_group_size=NUM_ROWS, compression="none", use_dictionary=False, data_page_size=512)
    )
    files, reads = manifest._source.files, 0

    class Failing(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            nonlocal reads
            reads += 1
            if reads in (40, 41):
                raise OSError("connection reset")
            return super().read(size)

    class Storage:
        get_file_info = staticmethod(files.filesystem.get_file_info)
        open_input_file = staticmethod(lambda name: pa.PythonFile(Failing(name), mode="r"))

    monkeypatch.setattr(files, "filesystem", Storage())
    assert_rows(path, manifest)
    assert reads > 41 and pauses


def test_no_copy_is_begun_for_which_the_disk_has_no_room(tmp_path, cache, copied, monkeypatch):
    monkeypatch.setattr(row_table, "_BATCHES_PER_LOOK", 1)
    usage = type("Usage", (), {"free": 100_000})
    monkeypatch.setattr(row_table.shutil, "disk_usage", lambda folder: usage)
    written, inner = [], pa.RecordBatchFileWriter.write_batch
    monkeypatch.setattr(
        pa.RecordBatchFileWriter, "write_batch", lambda *a: written.append(1) or inner(*a), raising=False
    )
    with pytest.raises(RequestError, match=r"copy of its rows cannot be .* about 0\.0 GB needed, 0\.0 GB free; free"):
        Manifest(write(tmp_path / "m.parquet")).row(0)
    assert len(written) == 1 and not [p for p in cache.iterdir() if p.suffix != ".lock"]


def test_a_copy_whose_writer_is_killed_is_made_again(tmp_path, cache):
    """SIGKILL in the middle of the write."""
    path = tmp_path / "m.parquet"
    write(path, pa.concat_tables([table()] * 2))
    code = f"""
import os, signal
from pipeline.data import row_table
row_table._BATCHES_PER_LOOK = 2
row_table._check_room = lambda *args, **more: os.kill(os.getpid(), signal.SIGKILL)
row_table.Rows({str(path)!r}, (), columns=None, known=None).opened
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=200, check=False).returncode == -9
    assert [p.name.endswith(".partial") for p in cache.iterdir() if p.suffix != ".lock"] == [True]
    manifest = Manifest(str(path))
    assert [manifest.row(n)["id"] for n in (0, 19_999)] == ["row-0", "row-9999"]
    assert not list(cache.glob(".*.partial"))


def test_row_groups_in_memory_are_bounded_over_all_streams(tmp_path, too_large, monkeypatch):
    known = Manifest(folder := three_files(tmp_path)).index
    one, other = (Manifest(folder, known=known, columns=("id", "labels")) for _ in range(2))
    read, inner = [], RowGroups._read_group
    monkeypatch.setattr(RowGroups, "_read_group", lambda self, *args: read.append(args) or inner(self, *args))
    cache = row_groups.GroupCache()
    monkeypatch.setattr(row_groups, "_CACHE", cache)
    assert [m.row(n)["id"] for n in (250, 251, 2250) for m in (one, other)][::2] == ["row-250", "row-251", "row-2250"]
    assert read == [(0, 2), (2, 2)]
    size = cache._bytes // 2
    monkeypatch.setattr(row_groups, "_KEPT_BYTES", 2 * size)
    for n in range(0, 3000, 100):
        assert one.row(n)["id"] == f"row-{n}"
        assert (
            cache._bytes == sum(group.nbytes for group in cache._groups.values()) <= 2 * size or len(cache._groups) == 1
        )


@pytest.mark.parametrize("opens", ["check", "pretrain", "preprocess", "decode"])
def test_large_row_groups_in_place_are_refused_alike_with_the_command_that_mends_them(
    tmp_path, too_large, make_data_set, monkeypatch, opens
):
    monkeypatch.setattr(row_groups, "_MAX_ROWS_PER_GROUP", 1000)
    data_set = make_data_set(write(tmp_path / "m.parquet", row_group_size=NUM_ROWS))
    with pytest.raises(RequestError, match=rf"python -m pipeline\.data\.regroup {data_set.manifest} FOLDER"):
        if opens == "check":
            facts_of(data_set, [])
        elif opens == "pretrain":
            _check_data_set(data_set, {})
        elif opens == "preprocess":
            _checked_job(data_set, [], tmp_path / "out", DecodeLimits(), 10)
        else:
            MediaSource(data_set, modalities=("image",)).id(0)


def test_a_copy_is_made_once_and_opens_no_file(tmp_path, cache, copied, monkeypatch):
    path = tmp_path / "m.parquet"
    fingerprint = Manifest(write(path)).fingerprint
    monkeypatch.setattr(parquet_files.ParquetFiles, "_read", None)
    manifest = Manifest(str(path))
    assert manifest.num_rows == NUM_ROWS and manifest.fingerprint == fingerprint
    assert manifest.row(7) == wanted(path, 7)


@pytest.mark.parametrize("told", [{"ETag": "1"}, {"created": 1.0}, {}])
def test_another_manifest_on_storage_that_tells_no_time_gets_its_own_copy(tmp_path, copied, monkeypatch, told):
    """As on the web, or on a hub: the name and the size are the same."""
    web, says = fsspec.filesystem("memory"), {}
    inner = type(web).info

    def info(self, path, **options):
        return {key: inner(self, path, **options)[key] for key in ("name", "size", "type")} | says

    monkeypatch.setattr(type(web), "info", info)

    def first_id(letter: str, told: dict) -> str:
        path = write(tmp_path / "m.parquet", pa.table({"id": [f"{letter}-{i}" for i in range(9)]}))
        web.pipe("/changed/m.parquet", Path(path).read_bytes())
        says.update(told)
        return Manifest("memory://changed/m.parquet").row(0)["id"]

    assert first_id("a", told) == first_id("a", told) == "a-0"
    assert first_id("b", {name: value * 2 for name, value in told.items()}) == "b-0"


def test_another_manifest_of_the_same_size_and_time_gets_its_own_copy(tmp_path, copied):
    """As ``cp -p`` or a restored backup leave it."""
    path = tmp_path / "m.parquet"
    first = Manifest(write(path, table(), compression="none", use_dictionary=False))
    before, status = first.row(0), path.stat()
    rows = table()
    path.unlink()
    write(path, rows.take(np.arange(NUM_ROWS)[::-1]), compression="none", use_dictionary=False)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size and path.stat().st_mtime_ns == status.st_mtime_ns
    second = Manifest(str(path))
    assert second.row(0)["id"] == f"row-{NUM_ROWS - 1}" and second.fingerprint != first.fingerprint
    assert first.row(0) == before


@pytest.mark.parametrize("damage", ["empty", "short", "noise", "no description"])
def test_a_damaged_copy_is_made_again(tmp_path, cache, copied, damage):
    path = tmp_path / "m.parquet"
    Manifest(write(path)).row(0)
    (copy,) = cache.glob("*.arrow")
    if damage == "empty":
        copy.write_bytes(b"")
    elif damage == "short":
        copy.write_bytes(copy.read_bytes()[:-1])
    elif damage == "noise":
        copy.write_bytes(bytes(copy.stat().st_size))
    else:
        copy.with_suffix(".json").write_text("{")
    assert_rows(path, Manifest(str(path)))


def test_processes_that_start_at_once_share_one_copy(tmp_path, cache):
    path = write(tmp_path / "m.parquet", pa.concat_tables([table()] * 2))
    code = f"from pipeline.data.manifest import Manifest; print(Manifest({path!r}).row(19_999)['id'])"
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(3)]
    assert {p.communicate(timeout=200)[0] for p in started} == {b"row-9999\n"}
    assert len(list(cache.glob("*.arrow"))) == 1


def test_old_copies_make_room(tmp_path, cache, copied, monkeypatch):
    monkeypatch.setattr(row_table, "_KEPT_COPIES", 2)
    manifests = [Manifest(write(tmp_path / f"{i}.parquet")) for i in range(4)]
    for number, manifest in enumerate(manifests):
        manifest.row(0)
        for copy in cache.glob("*.arrow"):
            os.utime(copy, (1000 + number, 1000 + number)) if copy.stat().st_mtime > 1e6 else None
    assert len(list(cache.glob("*.arrow"))) == 2
    # What is open stays readable.
    assert manifests[0].row(9) == wanted(tmp_path / "0.parquet", 9)


def test_what_killed_writers_left_makes_room(tmp_path, cache, copied):
    path = tmp_path / "m.parquet"
    Manifest(write(path)).row(0)
    (copy,) = cache.glob("*.arrow")
    copy.unlink()
    names = [f".{copy.name}.1-2.partial", ".another.arrow.1-2.partial", ".old.arrow.1-2.partial"]
    for name in names:
        (cache / name).touch()
    os.utime(cache / names[2], (1000, 1000))
    assert Manifest(str(path)).row(9) == wanted(path, 9)
    assert [name for name in names if (cache / name).exists()] == [".another.arrow.1-2.partial"]


def test_copies_that_another_process_removes_are_passed_over(tmp_path, cache, copied, monkeypatch):
    monkeypatch.setattr(row_table, "_KEPT_COPIES", 1)
    cache.mkdir(parents=True)
    # What a listing has seen and what is gone by now look the same.
    (cache / "gone.arrow").symlink_to(tmp_path / "nothing")
    path = tmp_path / "m.parquet"
    assert Manifest(write(path)).row(9) == wanted(path, 9)
    assert not (cache / "gone.arrow").is_symlink()


def test_no_room_for_a_copy(tmp_path, monkeypatch, copied):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IMP_CACHE", str(tmp_path / "file"))
    with pytest.raises(RequestError, match=r"m\.parquet: a copy of its rows cannot be written to .*; free some space"):
        Manifest(write(tmp_path / "m.parquet")).row(0)


def test_a_disk_that_fills_leaves_nothing_behind(tmp_path, cache):
    """A limit on the size of files stops the write as a full disk does."""
    path = write(tmp_path / "m.parquet", pa.concat_tables([table()] * 2))
    code = f"""
import resource, signal
from pipeline.data.columns import Fingerprint, normalise
from pipeline.data.manifest import Manifest, copy_rows
from pipeline.errors import RequestError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, 1 << 17))
try:
    Manifest({path!r}).row(0)
except RequestError as e:
    print(e)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert "cannot be written" in out.stdout and out.returncode == 0, out.stderr
    assert not [p for p in cache.iterdir() if p.suffix != ".lock"]


# --- the fingerprint ---


def fingerprint(path, rows: pa.Table | None = None, **options) -> dict:
    return Manifest(write(path, rows, **options)).fingerprint


def test_the_same_rows_have_one_fingerprint_however_they_lie(tmp_path, monkeypatch):
    base = fingerprint(tmp_path / "a" / "m.parquet")
    assert base["num_rows"] == NUM_ROWS
    assert fingerprint(tmp_path / "b" / "m.parquet", row_group_size=33, compression="zstd") == base
    folder = tmp_path / "c"
    write(folder / "1.parquet", table(0, 5001))
    write(folder / "2.parquet", table(5001))
    assert Manifest(str(folder)).fingerprint == base
    large = pa.schema([(f.name, pa.large_string() if f.type == pa.string() else f.type) for f in table().schema])
    assert fingerprint(tmp_path / "d" / "m.parquet", table().cast(large)) == base
    # Media may move.
    assert fingerprint(tmp_path / "e" / "m.parquet", table(image=[f"s3://{i}" for i in range(NUM_ROWS)])) == base
    monkeypatch.setattr(row_table, "_IN_MEMORY_ROWS", 0)
    assert fingerprint(tmp_path / "f" / "m.parquet") == base


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_the_size_of_pieces_changes_no_fingerprint(size):
    rows, columns = table(0, 100), ["id", "text", "labels", "start_s"]
    whole, pieces = Fingerprint(), Fingerprint()
    whole.update(normalise(rows.to_batches()[0], columns))
    for start in range(0, 100, size):
        pieces.update(normalise(rows.slice(start, size).combine_chunks().to_batches()[0], columns))
    assert pieces.digests() == whole.digests()


def swapped(column: str, one: int, other: int) -> pa.Table:
    values = table()[column].to_pylist()
    values[one], values[other] = values[other], values[one]
    return table(**{column: pa.array(values, table().schema.field(column).type)})


@pytest.mark.parametrize(
    ("column", "rows"),
    [
        ("id", swapped("id", 1234, 1235)),
        ("text", swapped("text", 10, 12)),
        ("labels", swapped("labels", 9998, 9999)),
        ("start_s", swapped("start_s", 5, 10)),
    ],
)
@pytest.mark.parametrize("kind", ["memory", "groups"])
def test_each_column_has_its_own_digest(tmp_path, monkeypatch, column, rows, kind):
    if kind == "groups":
        monkeypatch.setattr(row_table, "_IN_MEMORY_ROWS", 0)
        monkeypatch.setattr(row_table, "_MAX_COPIED_ROWS", 0)
    base = fingerprint(tmp_path / "a.parquet", row_group_size=10_000)
    other = fingerprint(tmp_path / "b.parquet", rows, row_group_size=10_000)
    assert {name for name in base if base[name] != other[name]} - {"footers"} == {column}


def test_null_empty_and_absent_words_differ(tmp_path):
    kinds = [[None], [[]], [[""]], [["", ""]], [[None]], [["ab"]], [["a", "b"]]]
    type_ = pa.list_(pa.string())
    found = [
        fingerprint(tmp_path / f"{i}.parquet", pa.table({"id": ["x"], "text": pa.array(k, type_)}))["text"]
        for i, k in enumerate(kinds)
    ]
    assert len(set(found)) == len(kinds)


# --- damage against storage out of reach ---


@pytest.fixture
def pauses(monkeypatch):
    """The pauses between tries, which are not waited for."""
    found = []
    monkeypatch.setattr(storage.time, "sleep", found.append)
    return found


def damage(path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[-8:-4], "little")
    if kind == "thrift":
        content[-8 - length : -8] = os.urandom(length)
    elif kind == "pages":
        content[4 : len(content) - 8 - length] = np.random.default_rng(0).bytes(len(content) - 12 - length)
    elif kind == "encrypted":
        content[-4:] = content[:4] = b"PARE"
    elif kind == "torn":
        content = content[: len(content) // 2]
    elif kind == "footer length":
        content[-8:-4] = (1 << 31).to_bytes(4, "little")
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("kind", ["thrift", "pages", "encrypted", "torn", "footer length"])
@pytest.mark.parametrize("compression", ["snappy", "zstd"])
def test_damage_is_a_wrong_request_at_once(tmp_path, pauses, kind, compression):
    path = tmp_path / "m.parquet"
    write(path, compression=compression)
    damage(path, kind)
    with pytest.raises(RequestError, match=r"m\.parquet.*: expected a Parquet file: .*; make it again") as caught:
        Manifest(str(path)).row(0)
    assert "\n" not in str(caught.value) and not pauses


def test_one_flipped_bit_is_found_where_pages_have_checksums(tmp_path, pauses):
    path = tmp_path / "m.parquet"
    write(path, compression="none", use_dictionary=False, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[content.index(b"row-77")] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(RequestError, match=r"m\.parquet, row group 0: expected a Parquet file: .*CRC"):
        Manifest(str(path)).row(0)


def test_storage_that_fails_is_tried_again_and_is_no_damage(tmp_path, pauses, monkeypatch):
    path = write(tmp_path / "m.parquet")
    manifest, failures = Manifest(path), iter([True, True, True, True, False])

    def open_input_file(self, name):
        if next(failures, False):
            raise OSError("connection reset")
        return pa.OSFile(name)

    files = manifest._source.files
    monkeypatch.setattr(files, "filesystem", type("Flaky", (), {"open_input_file": open_input_file})())
    # Two failures a try: of the read, and of the look at the bytes.
    assert manifest.row(3)["id"] == "row-3" and len(pauses) == 2
    failures = iter([True] * 100)
    with pytest.raises(DataError, match="could not be read after 5 tries: connection reset"):
        files.group(path, 0, ["id"])


def test_a_column_that_stands_there_twice(tmp_path):
    rows = pa.table([["a"], ["b"]], names=["id", "id"])
    pq.write_table(rows, tmp_path / "m.parquet")
    with pytest.raises(RequestError, match=r"m\.parquet: column 'id' appears 2 times; keep one of them"):
        Manifest(str(tmp_path / "m.parquet")).require({"id": "a task"})


def test_files_of_a_folder_with_other_columns(tmp_path):
    """A later file without captions has none; one whose ids are numbers is refused."""
    write(tmp_path / "s" / "1.parquet", table(0, 10))
    write(tmp_path / "s" / "2.parquet", table(10, 20).drop_columns(["text"]))
    manifest = Manifest(str(tmp_path / "s"))
    assert manifest.row(15)["text"] is None and manifest.row(15)["labels"] == ["a"]
    assert isinstance(manifest._rows, RowTable)
    write(tmp_path / "s" / "3.parquet", pa.table({"id": [[1], [2]]}))
    with pytest.raises(RequestError, match=r"3\.parquet: column 'id': expected a string, found list"):
        Manifest(str(tmp_path / "s")).row(0)


@pytest.mark.parametrize("letter", ["x", "ü", "\N{GRINNING FACE}"])
def test_absurdly_long_texts_are_cut_between_characters(tmp_path, monkeypatch, letter):
    monkeypatch.setattr(columns, "MAX_TEXT_BYTES", 10)
    texts = [["a", letter * 11], None, [letter * (10 // len(letter.encode()))], [None, "x" + letter * 9], []]
    rows = pa.table({"id": list("abcde"), "text": pa.array(texts, pa.list_(pa.string()))})
    manifest = Manifest(write(tmp_path / "m.parquet", rows))
    most = 10 // len(letter.encode())
    after_x = letter * (9 // len(letter.encode()))
    wanted = [["a", letter * most], None, texts[2], ["x" + after_x], []]
    assert list(manifest.iter_column("text")) == wanted


def test_a_machine_makes_its_copies_before_its_first_sample_is_waited_for(
    tmp_path, cache, copied, make_data_set, monkeypatch
):
    folder = three_files(tmp_path)
    known = Manifest(folder).index
    monkeypatch.setenv("IMP_CACHE", str(tmp_path / "elsewhere"))
    copy_rows([make_data_set(folder), dataclasses.replace(make_data_set(folder), index=known)])
    (copy,) = (tmp_path / "elsewhere" / "manifests").glob("*.arrow")
    assert copy.stem == known.stamp


def test_copies_make_room_where_the_disk_is_short(tmp_path, cache, copied, monkeypatch):
    for number in range(3):
        Manifest(write(tmp_path / f"{number}.parquet", table(number))).row(0)
    usage = type("Usage", (), {"free": property(lambda self: 10 << 30 if len(list(cache.glob("*.arrow"))) < 2 else 0)})
    monkeypatch.setattr(row_table.shutil, "disk_usage", lambda folder: usage())
    Manifest(write(tmp_path / "new.parquet", table(7))).row(0)
    assert len(list(cache.glob("*.arrow"))) == 2
