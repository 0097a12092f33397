"""A manifest written again with small row groups."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.manifest import Manifest
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


def test_the_rows_are_the_same_and_their_media_are_found(tmp_path, folder, capsys):
    assert main([str(folder), str(tmp_path / "out")]) == 0
    assert "6,000 rows" in capsys.readouterr().out
    before, after = Manifest(str(folder)), Manifest(str(tmp_path / "out"))
    assert after.fingerprint == before.fingerprint
    assert all(after.row(n) == before.row(n) for n in (0, 1, 2, 2999, 3000, 5999))
    assert after.row(0)["image"] == f"{folder}/images/0.png"
    footer = pq.read_metadata(tmp_path / "out" / "0.parquet")
    assert [footer.row_group(n).num_rows for n in range(footer.num_row_groups)] == [1024, 1024, 952]


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
