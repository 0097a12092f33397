"""Repeated hashes against Python's own counts, within memory and beyond it."""

import collections
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data import repeated
from pipeline.data.repeated import Repeated

HASHES = st.lists(st.integers(0, 6) | st.integers(0, 2**64 - 1), max_size=60)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hashes=HASHES, piece=st.integers(1, 20), sizes=st.integers(1, 9))
def test_counts_and_places_as_python_finds_them(tmp_path_factory, hashes, piece, sizes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeated, "_PIECE", piece)
        found = Repeated(tmp_path_factory.mktemp("parts"))
        for start in range(0, len(hashes), sizes):
            found.add(np.array(hashes[start : start + sizes], np.uint64))
        entries = [entry for part in found.entries() for entry in part.tolist()]
    counts = collections.Counter(hashes)
    assert sorted(entries) == sorted((value, hashes.index(value), count) for value, count in counts.items())
    later = [value in hashes[:place] for place, value in enumerate(hashes)]
    assert found.later(0, len(hashes)).tolist() == later and found.num_hashes == len(hashes)
    for start in range(len(hashes)):
        assert found.later(start, len(hashes)).tolist() == later[start:]


@pytest.mark.parametrize("kind", ["one", "different"])
def test_memory_does_not_grow_with_the_number_of_hashes(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(repeated, "_PIECE", 1 << 14)
    monkeypatch.setattr(repeated, "_PART_BITS", 6)
    found, pieces = Repeated(tmp_path), 64
    tracemalloc.start()
    for piece in range(pieces):
        numbers = np.arange(1 << 14, dtype=np.uint64) + np.uint64(piece << 14)
        found.add(np.full(1 << 14, 7, np.uint64) if kind == "one" else numbers * np.uint64(0x9E3779B97F4A7C15))
    ids = sum(len(part) for part in found.entries())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert ids == (1 if kind == "one" else pieces << 14) and peak < 8e6
    on_disk = sum(path.stat().st_size for path in tmp_path.glob("part-*"))
    assert on_disk == (pieces * 24 if kind == "one" else (pieces << 14) * 24)
