"""Repeated ids and shared rows of whole manifests, against Python's own sets and counts."""

import collections
import os
import types

import numpy as np
import pyarrow as pa
import pytest

from pipeline.data import ids, repeated
from pipeline.data.ids import Overlap, Repeats, hashes, overlap, repeats, resolved
from pipeline.data.manifest import Manifest
from pipeline.files import cache_dir


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_hashes_are_equal_where_texts_are(kind):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("ab\0é"), size=n)) for n in rng.integers(0, 12, 2000)] + ["x" * 600, "x" * 601, ""]
    found = hashes(pa.array([*texts, *reversed(texts)], kind))
    assert len(set(found.tolist())) == len(set(texts))
    assert found[: len(texts)].tolist() == found[len(texts) :][::-1].tolist()
    assert hashes(pa.array(texts, kind)[7:90]).tolist() == found[7:90].tolist()
    # What an id hashes to depends on no neighbour, no thread and no version: compared between manifests.
    assert hashes(pa.array(["a", None, ""]))[1:].tolist() == hashes(pa.array(["", ""])).tolist()


def manifest(write_manifest, path, names, **columns) -> Manifest:
    rows = [{"id": name} | {key: values[i] for key, values in columns.items()} for i, name in enumerate(names)]
    return Manifest(write_manifest(path, rows, row_group_size=7))


def test_repeats_as_python_counts_them(tmp_path, write_manifest):
    rng = np.random.default_rng(1)
    names = [f"id-{n}" for n in rng.integers(0, 60, 50)]
    counts = {name: n for name, n in collections.Counter(names).items() if n > 1}
    found = repeats(manifest(write_manifest, tmp_path / "m.parquet", names))
    assert (found.looked_at, found.ids, found.rows) == (50, len(counts), sum(counts.values()))
    assert counts[found.example[0]] == found.example[1]


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"], [f"{i}" for i in range(100)]])
def test_ids_of_their_own_are_no_repeats(tmp_path, write_manifest, names):
    assert repeats(manifest(write_manifest, tmp_path / "m.parquet", names)) == Repeats(len(names))


def test_a_manifest_full_of_repeats_is_not_read_to_its_end(tmp_path, write_manifest, monkeypatch):
    monkeypatch.setattr(repeated, "_PIECE", 14)
    found = repeats(manifest(write_manifest, tmp_path / "m.parquet", ["same"] * 5000))
    assert found == Repeats(4096, 1, 4096, ("same", 4096))


def test_of_more_rows_than_fit_into_memory_all_are_compared(tmp_path, write_manifest, monkeypatch):
    monkeypatch.setattr(repeated, "_PIECE", 5000)
    names = [f"{i % 17_000}" for i in range(20_000)]
    found = repeats(manifest(write_manifest, tmp_path / "m.parquet", names))
    assert (found.looked_at, found.ids, found.rows, found.example[1]) == (20_000, 3000, 6000, 2)
    assert int(found.example[0]) < 3000 and not list(cache_dir().glob("ids-*"))
    monkeypatch.setattr(ids, "MAX_ROWS", 20)
    assert repeats(manifest(write_manifest, tmp_path / "m.parquet", names)).looked_at <= 20


def test_held_out_rows_that_are_training_rows(tmp_path, write_manifest):
    """By id, or by the file that the paths lead to, however they are written; an empty path is no file."""
    train = manifest(
        write_manifest,
        tmp_path / "train.parquet",
        ["a", "b", "c", "d"],
        image=["x/1.png", f"{tmp_path}/x/2.png", None, "s3://b/3.png"],
    )
    held_out = manifest(
        write_manifest,
        tmp_path / "x" / "test.parquet",
        ["a", "e", "f", "g", "h"],
        image=["9.png", "1.png", "2.png", None, "s3://b/3.png"],
    )
    assert overlap(train, held_out) == Overlap(rows=5, ids=1, media=3)
    assert overlap(held_out, train) == Overlap(rows=4, ids=1, media=3)


def test_paths_of_one_file_are_equal(tmp_path):
    manifest = types.SimpleNamespace(resolve=lambda path: f"/data/sets/{path}")
    paths = ["a/b.jpg", "./a/b.jpg", "a//b.jpg", "a/./c/.././b.jpg", "../sets/a/b.jpg", "/data/x/y/../../sets/a/b.jpg"]
    assert set(resolved(manifest, pa.array(paths)).to_pylist()) == {b"/data/sets/a/b.jpg"}
    odd = ["../../up.jpg", "s3://bucket/a/../b", "..a/b", ".hidden/...c/d", "", None]
    expected = [os.path.normpath(f"/data/sets/{odd[0]}"), odd[1], *(f"/data/sets/{path}" for path in odd[2:4]), "", ""]
    assert resolved(manifest, pa.array(odd)).to_pylist() == [path.encode() for path in expected]
