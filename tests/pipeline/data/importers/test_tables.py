"""Tables of other people's making: odd cells, bad lines, other encodings."""

from __future__ import annotations

import collections
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.importers import import_layout
from pipeline.data.importers.listing import Skipped
from pipeline.data.importers.tables import table
from pipeline.errors import RequestError


def put(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def test_cells_are_never_read_as_what_they_are_not(tmp_path):
    cells = [
        {"id": 0, "image": "a.png", "text": ["a", None], "labels": [None, 7]},
        {"id": False, "image": b"b.png", "text": b"bytes", "labels": float("nan")},
        {"image": {"bytes": None, "path": "c.png"}, "text": None},
        {"id": "d", "image": {"bytes": b"P5 1 1", "path": "d.png"}},
        {"id": "e", "image": b"\xff\xd8"},
        {"id": "f", "image": ["f.png", "g.png"]},
        {"id": "g", "image": "g.png", "text": [["nested"]]},
        {"id": "h", "image": "h.png", "text": {"raw": "h"}},
        *({"id": f"t{i}", "image": "t.png", "start_s": f"00:00:0{i}"} for i in range(3)),
    ]
    for i, cell in enumerate(cells):  # a file each: their columns have different types
        pq.write_table(pa.Table.from_pylist([cell]), tmp_path / f"{i}.parquet")
    rows, reasons = {}, collections.Counter()
    for i in range(len(cells)):
        skipped = Skipped()
        rows[i] = list(table(str(tmp_path / f"{i}.parquet"), skipped))
        reasons.update({reason: count for reason, (count, _) in skipped.reasons.items()})
    found = [(r["id"], r["image"].rpartition("/")[2], r["text"], r["labels"]) for (r,) in filter(None, rows.values())]
    assert found == [
        ("0", "a.png", ["a"], ["7"]),
        ("False", "b.png", ["bytes"], []),
        ("row-0000000000", "c.png", [], []),
    ]
    assert reasons == {
        "a file's content in image, expected its path; write it to a file": 2,
        "a value of image that holds others": 1,
        "a value of text that holds others": 2,
        "a value of start_s that is not a number of seconds": 3,
    }


def test_json_with_bad_lines_and_json_arrays_give_all_their_objects(tmp_path):
    lines = put(tmp_path / "t.jsonl", '{"id": "a", "image": "a.png"}\n\n{"id": "b",\n{"id": "c", "image": "c.png"}\n')
    done = import_layout("table", str(lines), tmp_path / "t.parquet")
    assert done.skipped == {"not a JSON object": (1, 'record 3: {"id": "b",')}
    assert pq.read_table(tmp_path / "t.parquet")["id"].to_pylist() == ["a", "c"]
    array = put(tmp_path / "u.json", '[\n  {"id": "a", "image": "a.png"},\n  {"id": "b", "image": "b.png"}\n]\n')
    skipped = Skipped()
    assert [row["id"] for row in table(str(array), skipped)] == ["a", "b"] and not skipped.reasons


def test_tables_of_spreadsheets_may_be_utf_16_and_have_long_cells_but_no_name_twice(tmp_path):
    (tmp_path / "t.tsv").write_bytes(f"image\ttext\na.png\tcafé {'x' * 200_000}\n".encode("utf-16"))
    (row,) = table(str(tmp_path / "t.tsv"), Skipped())
    assert row["text"] == [f"café {'x' * 200_000}"]
    with pytest.raises(RequestError, match="found 'image' more than once"):
        list(table(str(put(tmp_path / "u.csv", "image,image\na.png,b.png\n")), Skipped()))


def test_a_folder_of_media_is_named_as_seen_from_where_the_command_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = put(tmp_path / "t.csv", "image\na.png\n")
    for folder, found in (("photos", f"{tmp_path}/photos/a.png"), ("s3://b/photos/", "s3://b/photos/a.png")):
        (row,) = table(str(source), Skipped(), folder=folder)
        assert row["image"] == found


def test_a_table_of_ever_other_columns_is_summed_up(tmp_path):
    lines = "".join(f'{{"image": "a.png", "tag{i}": 1}}\n' for i in range(500))
    done = import_layout("table", str(put(tmp_path / "t.jsonl", lines)), tmp_path / "t.parquet")
    assert len(done.kept) == 31 and sum(count for count, _ in done.kept.values()) == 500
    assert done.kept["for other reasons"] == (470, "column 'tag30' not used, no option names it: 1")
