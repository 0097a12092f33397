"""Every process of a stream reads the rows that the run began with."""

import dataclasses
import pickle

import pytest

from pipeline.data import row_table
from pipeline.data.known_rejects import NONE_KNOWN
from pipeline.data.manifest import Manifest
from pipeline.data.spec import TokenSpec
from pipeline.data.stream_spec import StreamSpec
from pipeline.errors import RequestError


def test_a_machine_that_sees_other_rows_is_a_wrong_request(tmp_path, make_task, make_data_set, write_manifest):
    """Another copy of the manifest on another host, or one exchanged for another of equal length in a running run."""
    rows = [{"id": str(i), "image": f"{i}.png", "labels": ["x"]} for i in range(20)]
    manifest = write_manifest(tmp_path / "m.parquet", rows)
    data_set = make_data_set(manifest)
    spec = spec_of(make_task(), data_set, Manifest(manifest).fingerprint)
    spec.maker()
    # What a process keeps for it serves an equal one of another rank, and no other.
    assert pickle.loads(pickle.dumps(spec)).key == dataclasses.replace(spec).key == spec.key
    assert dataclasses.replace(spec, stop=6).key != spec.key
    other = make_data_set(write_manifest(tmp_path / "other.parquet", rows[::-1]))
    with pytest.raises(RequestError, match=r"data_sets\.toy: a machine of the run reads other rows"):
        dataclasses.replace(spec, data_set=other).maker()


@pytest.mark.parametrize("most_copied", [0, 100], ids=["in place", "copied"])
def test_with_an_index_a_stream_reads_the_same_rows(
    tmp_path, make_task, make_data_set, write_manifest, monkeypatch, most_copied
):
    monkeypatch.setenv("IMP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(row_table, "_IN_MEMORY_ROWS", 0)
    monkeypatch.setattr(row_table, "_MAX_COPIED_ROWS", most_copied)
    (tmp_path / "set").mkdir()
    rows = [{"id": str(i), "image": f"{i}.png", "labels": ["x"], "text": [f"a {i}"]} for i in range(20)]
    for number in range(2):
        write_manifest(tmp_path / "set" / f"{number}.parquet", rows[number * 10 : number * 10 + 10], row_group_size=3)
    manifest = Manifest(str(tmp_path / "set"))
    plain = make_data_set(str(tmp_path / "set"))
    data_set = dataclasses.replace(plain, index=manifest.index)
    assert data_set == plain and bool(data_set.index.files) == (most_copied == 0)
    made = [
        pickle.loads(pickle.dumps(spec_of(make_task(), found, manifest.fingerprint))).maker()
        for found in (data_set, plain)
    ]
    visited = [[maker.source.id(row) for row in range(20)] for maker in made]
    assert visited[0] == visited[1] == [str(i) for i in range(20)]
    assert made[0].source.media_path(13) == f"{tmp_path}/set/13.png"
    assert made[0].source.text_and_labels(13) == ([] if most_copied == 0 else ["a 13"], ["x"])


def spec_of(task, data_set, fingerprint) -> StreamSpec:
    return StreamSpec(
        task=task,
        data_set=data_set,
        tokens=TokenSpec(),
        tokenizer=None,
        seed=1,
        fingerprint=fingerprint,
        start=0,
        stop=5,
        share=1.0,
        known_bad=NONE_KNOWN,
        cache_bytes=0,
    )
