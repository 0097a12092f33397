"""Manifests: rows over files and row groups, relative paths, and errors that say what is missing."""

from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.columns import NOT_UTF8
from pipeline.data.manifest import Manifest
from pipeline.errors import RequestError


def rows(start: int, stop: int) -> list[dict]:
    return [{"id": f"row-{i}", "image": f"images/{i}.png", "text": [f"text {i}", "more"]} for i in range(start, stop)]


def test_one_file(tmp_path, write_manifest):
    manifest = Manifest(write_manifest(tmp_path / "m.parquet", rows(0, 3)))
    assert manifest.num_rows == 3 and manifest.schema.names == ["id", "image", "text"]
    assert manifest.row(1) == {"id": "row-1", "image": f"{tmp_path}/images/1.png", "text": ["text 1", "more"]}


@given(sizes=st.lists(st.integers(0, 7), min_size=1, max_size=4).filter(any), group=st.integers(1, 4), data=st.data())
@settings(max_examples=25, deadline=None)
def test_rows_over_files_and_row_groups(tmp_path_factory, write_manifest, sizes, group, data):
    folder, start = tmp_path_factory.mktemp("manifest"), 0
    for number, size in enumerate(sizes):
        name = folder / f"part-{number}.parquet"
        write_manifest(name, rows(start, start + size), row_group_size=group, columns=["id", "image", "text"])
        start += size
    manifest = Manifest(str(folder))
    assert manifest.num_rows == start
    for index in data.draw(st.lists(st.integers(0, start - 1), max_size=20)):
        assert manifest.row(index)["id"] == f"row-{index}"
        assert manifest.row(index)["image"] == f"{folder}/images/{index}.png"
    assert list(manifest.iter_column("id")) == [f"row-{i}" for i in range(start)]


def test_files_are_sorted_by_name_and_others_left_out(tmp_path, write_manifest):
    for number in (10, 2, 1):
        write_manifest(tmp_path / f"part-{number:02d}.parquet", rows(number, number + 1))
    (tmp_path / "_SUCCESS").touch()
    write_manifest(tmp_path / "deeper" / "part-00.parquet", rows(50, 51))
    assert list(Manifest(str(tmp_path)).iter_column("id")) == ["row-1", "row-2", "row-10"]


@pytest.mark.parametrize("index", [-1, 3, 100])
def test_rows_that_are_not_there(tmp_path, write_manifest, index):
    manifest = Manifest(write_manifest(tmp_path / "m.parquet", rows(0, 3)))
    with pytest.raises(IndexError, match=f"row {index} of 3"):
        manifest.row(index)


def test_paths_are_relative_to_the_manifest(tmp_path, write_manifest, monkeypatch):
    names = ["a.png", "sub/b.png", "/abs/c.png", "s3://bucket/d.png", None]
    table = [{"id": str(i), "image": name, "video": name} for i, name in enumerate(names)]
    write_manifest(tmp_path / "set" / "m.parquet", table)
    full = [f"{tmp_path}/set/a.png", f"{tmp_path}/set/sub/b.png", "/abs/c.png", "s3://bucket/d.png", None]
    for uri in (f"{tmp_path}/set/m.parquet", f"{tmp_path}/set"):
        assert [Manifest(uri).row(i)["image"] for i in range(5)] == full
        assert [Manifest(uri).row(i)["video"] for i in range(5)] == full
    monkeypatch.chdir(tmp_path / "set")
    assert Manifest("m.parquet").row(1)["image"] in ("./sub/b.png", "sub/b.png")


def test_paths_of_a_manifest_elsewhere(tmp_path, write_manifest):
    import fsspec

    path = write_manifest(tmp_path / "m.parquet", rows(0, 1))
    assert Manifest(f"file://{path}").row(0)["image"] == f"file://{tmp_path}/images/0.png"
    with fsspec.open("memory://sets/m.parquet", "wb") as f:
        f.write((tmp_path / "m.parquet").read_bytes())
    resolved = Manifest("memory://sets/m.parquet").row(0)["image"]
    with fsspec.open("memory://sets/images/0.png", "wb") as f:
        f.write(b"pixels")
    assert resolved.startswith("memory://") and fsspec.open(resolved).open().read() == b"pixels"


def test_a_file_of_another_name_has_the_same_folder(tmp_path, write_manifest):
    """A file counts as a manifest whatever its name is, so its paths must be found too."""
    manifest = Manifest(write_manifest(tmp_path / "train.pq", rows(0, 1)))
    assert manifest.row(0)["image"] == f"{tmp_path}/images/0.png"


def test_nothing_there(tmp_path):
    for path in (tmp_path / "none.parquet", tmp_path):
        with pytest.raises(
            RequestError, match="expected a Parquet file or a folder of them, found nothing there; correct"
        ):
            Manifest(str(path))


@pytest.mark.parametrize("content", [b"", b"id,image\n1,a.png\n", b"PAR1" + bytes(100)])
def test_not_a_parquet_file(tmp_path, content):
    (tmp_path / "m.parquet").write_bytes(content)
    with pytest.raises(RequestError, match=r"m\.parquet: expected a Parquet file: .+") as caught:
        Manifest(str(tmp_path / "m.parquet"))
    assert "\n" not in str(caught.value)


def test_a_truncated_file(tmp_path, write_manifest):
    path = write_manifest(tmp_path / "m.parquet", rows(0, 50))
    (tmp_path / "m.parquet").write_bytes((tmp_path / "m.parquet").read_bytes()[:-20])
    with pytest.raises(RequestError, match="expected a Parquet file"):
        Manifest(path)


def test_no_rows(tmp_path):
    pq.write_table(pa.table({"id": pa.array([], pa.string())}), tmp_path / "m.parquet")
    with pytest.raises(RequestError, match=r"m\.parquet: expected rows, found none; remove the data set or fill it"):
        Manifest(str(tmp_path / "m.parquet"))


def test_missing_columns_are_named_with_their_tasks(tmp_path, write_manifest):
    manifest = Manifest(write_manifest(tmp_path / "m.parquet", rows(0, 1)))
    manifest.require({"id": "task a", "text": "task a"})
    with pytest.raises(RequestError) as caught:
        manifest.require({"id": "task a", "labels": "task a", "video": "task b"})
    assert str(caught.value) == (
        f"manifest {tmp_path}/m.parquet: expected column 'labels' (needed by task a); 'video' (needed by task b); "
        "found id, image, text. Add the column or change the task"
    )


# --- values that are hard to read ---

LATIN = "café".encode("latin-1")  # its last byte starts a character of UTF-8 that does not end
HARD = [
    {"id": b"row-0", "image": b"0.png", "text": [b"a cat", b"the dog"], "labels": [b"cat"]},
    {"id": b"row-1", "image": b"1.png", "text": [b"a cat", LATIN], "labels": [b"\xff\xfe", b"dog"]},
    {"id": b"row-\xff", "image": b"im\xe9.png", "text": None, "labels": None},
    {"id": b"row-\xfe", "image": None, "text": [None, b"one", None], "labels": [None]},
    {"id": b"row-4", "image": b"4.png", "text": [], "labels": ["ü".encode()]},
]
READABLE = [
    {"id": "row-0", "image": "0.png", "text": ["a cat", "the dog"], "labels": ["cat"]},
    {
        "id": "row-1",
        "image": "1.png",
        "text": ["a cat", NOT_UTF8 + "caf\\xe9"],
        "labels": [NOT_UTF8 + "\\xff\\xfe", "dog"],
    },
    {"id": "row-\\xff", "image": "im\\xe9.png", "text": None, "labels": None},
    {"id": "row-\\xfe", "image": None, "text": ["one"], "labels": []},
    {"id": "row-4", "image": "4.png", "text": [], "labels": ["ü"]},
]


@pytest.mark.parametrize("row_group_size", [1, 2, 100])
def test_one_bad_value_leaves_all_others_readable(tmp_path, write_raw_manifest, row_group_size):
    manifest = Manifest(write_raw_manifest(tmp_path / "m.parquet", HARD, row_group_size=row_group_size))
    manifest.require(dict.fromkeys(HARD[0], "task a"))
    for index, wanted in enumerate(READABLE):
        image = wanted["image"] and f"{tmp_path}/{wanted['image']}"
        assert manifest.row(index) == wanted | {"image": image}
    for column in HARD[0]:
        assert list(manifest.iter_column(column)) == [row[column] for row in READABLE]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("coded", [False, True])
def test_other_types_of_strings_may_be_bad_too(tmp_path, large, coded):
    raw, string, lists = (
        (pa.large_binary(), pa.large_string(), pa.LargeListArray) if large else (pa.binary(), pa.string(), pa.ListArray)
    )
    ids = pa.array([b"a", b"b\xff"], raw).view(string)
    words = pa.array([LATIN, b"x", b"y"], raw).view(string)
    if coded:
        ids, words = ids.dictionary_encode(), words.dictionary_encode()
    offsets = pa.array([0, 1, 3], pa.int64() if large else pa.int32())
    table = pa.table({"id": ids, "text": lists.from_arrays(offsets, words)})
    pq.write_table(table, tmp_path / "m.parquet")
    manifest = Manifest(str(tmp_path / "m.parquet"))
    manifest.require({"id": "task a", "text": "task a"})
    wanted = [{"id": "a", "text": [NOT_UTF8 + "caf\\xe9"]}, {"id": "b\\xff", "text": ["x", "y"]}]
    assert [manifest.row(i) for i in range(2)] == wanted
    assert list(manifest.iter_column("id")) == ["a", "b\\xff"]
    assert list(manifest.iter_column("text")) == [row["text"] for row in wanted]


def test_columns_of_string_views_and_of_lists_of_one_size_are_read_as_any_others(tmp_path):
    """Types of Arrow that other libraries write into a Parquet file's schema."""
    ids = pa.array([b"a", b"b\xff", b"a long name, stored apart"], pa.binary_view()).view(pa.string_view())
    texts = pa.array([["x", None], None, []], pa.list_(pa.string_view()))
    labels = pa.array([["k"], ["l"], None], pa.list_(pa.string(), 1))
    pq.write_table(pa.table({"id": ids, "text": texts, "labels": labels}), tmp_path / "m.parquet")
    manifest = Manifest(str(tmp_path / "m.parquet"))
    manifest.require(dict.fromkeys(("id", "text", "labels"), "task a"))
    assert [manifest.row(i) for i in range(3)] == [
        {"id": "a", "text": ["x"], "labels": ["k"]},
        {"id": "b\\xff", "text": None, "labels": ["l"]},
        {"id": "a long name, stored apart", "text": [], "labels": None},
    ]


def test_bad_values_in_a_column_that_nobody_asked_for(tmp_path):
    bad = pa.array([b"\xff"], pa.binary()).view(pa.string())
    extra = {"note": bad, "meta": pa.StructArray.from_arrays([bad], ["by"])}
    pq.write_table(pa.table({"id": ["a"], "start_s": [1.5], **extra}), tmp_path / "m.parquet")
    assert Manifest(str(tmp_path / "m.parquet")).row(0) == {"id": "a", "start_s": 1.5}


def test_a_megabyte_that_is_no_text_is_shown_in_part(tmp_path, write_raw_manifest):
    junk = bytes(range(256)) * 4096
    path = write_raw_manifest(tmp_path / "m.parquet", [{"id": b"a" + junk, "text": [junk]}])
    row = Manifest(path).row(0)
    assert row["text"][0].startswith(NOT_UTF8) and len(row["text"][0]) < 1000
    # Two ids may differ anywhere.
    assert row["id"].encode().count(b"\\xff") == 4096


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.binary(max_size=12), min_size=1, max_size=8))
def test_any_bytes_can_be_read(tmp_path_factory, write_raw_manifest, values):
    path = tmp_path_factory.mktemp("manifest") / "m.parquet"
    table = [{"id": str(i).encode(), "text": [value]} for i, value in enumerate(values)]
    manifest = Manifest(write_raw_manifest(path, table))
    for index, value in enumerate(values):
        (text,) = manifest.row(index)["text"]
        try:
            assert text == value.decode()
        except UnicodeDecodeError:
            assert text == NOT_UTF8 + value.decode(errors="backslashreplace")
        assert text.encode().decode() == text


def test_a_row_without_an_id_is_a_wrong_request(tmp_path, write_raw_manifest):
    names = [b"a", b"b\xff", None, b"d", None]
    path = write_raw_manifest(tmp_path / "m.parquet", [{"id": name} for name in names], row_group_size=2)
    manifest = Manifest(path)
    assert [manifest.row(i)["id"] for i in (0, 1, 3)] == ["a", "b\\xff", "d"]
    message = rf"manifest {path}: row 2: expected an id, found null; give every row its own"
    with pytest.raises(RequestError, match=message):
        manifest.row(2)
    with pytest.raises(RequestError, match=message):
        list(manifest.iter_column("id"))
    with pytest.raises(RequestError, match=message):
        manifest.require({"id": "task a"})
    write_raw_manifest(tmp_path / "a.parquet", [{"id": b"first"}, {"id": b"second"}])
    with pytest.raises(RequestError, match=r"row 4: expected an id"):
        list(Manifest(str(tmp_path)).iter_column("id"))


def test_a_missing_id_is_found_without_statistics(tmp_path):
    pq.write_table(pa.table({"id": ["a", None]}), tmp_path / "m.parquet", write_statistics=False)
    with pytest.raises(RequestError, match="row 1: expected an id, found null"):
        Manifest(str(tmp_path / "m.parquet")).require({"id": "task a"})


def test_times_are_numbers(tmp_path):
    for values, kind in (([1.5], pa.float32()), ([2], pa.int64()), ([Decimal("2.5")], pa.decimal128(5, 2))):
        pq.write_table(pa.table({"id": ["a"], "start_s": pa.array(values, kind)}), tmp_path / "m.parquet")
        manifest = Manifest(str(tmp_path / "m.parquet"))
        manifest.require({"id": "a task"})
        found = manifest.row(0)["start_s"]
        assert found == float(values[0]) and type(found) is float
    pq.write_table(pa.table({"id": ["a"], "start_s": ["1.5"]}), tmp_path / "m.parquet")
    with pytest.raises(RequestError, match="column 'start_s': expected a number of seconds, found string"):
        Manifest(str(tmp_path / "m.parquet")).require({"id": "a task"})
