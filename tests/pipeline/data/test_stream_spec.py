"""Every process of a stream reads the rows that the run began with."""

import dataclasses
import pickle

import pytest

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
    spec = StreamSpec(
        task=make_task(),
        data_set=data_set,
        tokens=TokenSpec(),
        tokenizer=None,
        seed=1,
        fingerprint=Manifest(manifest).fingerprint,
        start=0,
        stop=5,
        share=1.0,
        known_bad=NONE_KNOWN,
        cache_bytes=0,
    )
    spec.maker()
    # What a process keeps for it serves an equal one of another rank, and no other.
    assert pickle.loads(pickle.dumps(spec)).key == dataclasses.replace(spec).key == spec.key
    assert dataclasses.replace(spec, stop=6).key != spec.key
    other = make_data_set(write_manifest(tmp_path / "other.parquet", rows[::-1]))
    with pytest.raises(RequestError, match=r"data_sets\.toy: a machine of the run reads other rows"):
        dataclasses.replace(spec, data_set=other).maker()
