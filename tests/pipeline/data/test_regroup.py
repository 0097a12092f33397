"""A manifest written again with small row groups."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import parquet_files
from pipeline.data import regroup as regroup_module
from pipeline.data.manifest import Manifest
from pipeline.data.parquet_files import ParquetFiles
from pipeline.data.regroup import main, regroup
from pipeline.errors import RequestError


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "set"
    path.mkdir()
    for part in range(2):
        numbers = range(part * 3000, (part + 1) * 3000)
        images = [None if n % 3 == 1 else f"s3://bucket/{n}.png" if n % 3 else f"images/{n}.png" for n in numbers]
        rows = {"id": [f"row-{n}" for n in numbers], "image": images, "text": [[f"é {n}"] for n in numbers]}
        pq.write_table(pa.table(rows), path / f"{part}.parquet")
    return path


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr(regroup_module, "_ROWS_PER_GROUP", 1024)


def test_the_rows_are_the_same_and_their_media_are_found(tmp_path, folder, capsys, small_groups):
    assert main([str(folder), str(tmp_path / "out")]) == 0
    assert "6,000 rows" in capsys.readouterr().out
    before, after = Manifest(str(folder)), Manifest(str(tmp_path / "out"))
    assert after.fingerprint == before.fingerprint
    assert all(after.row(n) == before.row(n) for n in (0, 1, 2, 2999, 3000, 5999))
    assert after.row(0)["image"] == f"{folder}/images/0.png"
    footer = pq.read_metadata(tmp_path / "out" / "0.parquet")
    assert [footer.row_group(n).num_rows for n in range(footer.num_row_groups)] == [1024, 1024, 952]


def test_a_file_that_has_changed_since_is_written_anew(tmp_path, folder):
    out = tmp_path / "out"
    regroup(str(folder), out)
    kept = (out / "0.parquet").stat().st_ino
    pq.write_table(pa.table({"id": ["a"], "image": [None], "text": [["b"]]}), folder / "1.parquet")
    (out / "0.parquet").touch()
    assert regroup(str(folder), out) == 3001 and (out / "0.parquet").stat().st_ino == kept


def test_one_file_of_another_name_and_paths_of_an_added_modality(tmp_path):
    rows = {"id": ["a", "b"], "depth": ["depth/a.png", None]}
    pq.write_table(pa.table(rows), tmp_path / "train.pq")
    assert main([str(tmp_path / "train.pq"), str(tmp_path / "out"), "depth"]) == 0
    manifest = Manifest(str(tmp_path / "out"), media=("depth",))
    assert [manifest.row(n)["depth"] for n in range(2)] == [f"{tmp_path}/depth/a.png", None]


def test_row_groups_are_streamed_and_come_out_even(tmp_path, folder, monkeypatch, small_groups):
    monkeypatch.setattr(parquet_files, "_ROWS_PER_PIECE", 700)
    monkeypatch.setattr(ParquetFiles, "group", None)
    assert regroup(str(folder), tmp_path / "out") == 6000
    footer = pq.read_metadata(tmp_path / "out" / "1.parquet")
    assert [footer.row_group(n).num_rows for n in range(footer.num_row_groups)] == [1024, 1024, 952]
    assert list(Manifest(str(tmp_path / "out")).iter_column("id")) == [f"row-{n}" for n in range(6000)]


def test_a_stopped_try_goes_on_and_the_manifests_own_folder_is_refused(tmp_path, folder):
    out = tmp_path / "out"
    regroup(str(folder), out)
    kept = (out / "1.parquet").stat().st_ino
    (out / "0.parquet").unlink()
    assert regroup(str(folder), out) == 6000 and (out / "1.parquet").stat().st_ino == kept
    for own in (folder, folder / ".." / "set"):
        with pytest.raises(RequestError, match="expected another folder than that of the manifest"):
            regroup(str(folder), own)
    assert main([str(tmp_path / "nothing"), str(out)]) == 2 and main([]) == 2
