"""The index of a manifest's files against a plain list of its row groups."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.file_index import FileIndex, FileSummary, Group

# Rows of each row group of each file; empty groups and files too.
FILES = st.lists(st.lists(st.integers(0, 5), max_size=4) | st.tuples(st.integers(1, 4), st.integers(0, 4)), max_size=5)


def index_of(files: list[list[int]]) -> FileIndex:
    summaries = [FileSummary(100 + n, bytes([n]) * 16, np.array(g, np.int64)) for n, g in enumerate(files)]
    return FileIndex.of([f"{n}.parquet" for n in range(len(files))], summaries)


@settings(max_examples=100, deadline=None)
@given(FILES)
def test_every_row_is_found_in_its_group(drawn):
    # A pair is a file of even row groups, with a shorter one at its end.
    files = [[f[0]] * f[1] + [1] if isinstance(f, tuple) else f for f in drawn]
    index = FileIndex.from_bytes(index_of(files).to_bytes())
    assert index.paths == [f"{n}.parquet" for n in range(len(files))]
    assert index.bytes == [100 + n for n in range(len(files))]
    groups, first = [], 0
    for file, sizes in enumerate(files):
        assert index.file_groups(file) == len(sizes)
        for number, rows in enumerate(sizes):
            groups.append(Group(file, number, first, rows))
            first += rows
    assert (index.num_rows, index.num_groups) == (first, len(groups))
    assert [index.group(n) for n in range(len(groups))] == groups
    assert [index.group_of(row) for row in range(first)] == [g for g in groups for _ in range(g.rows)]
    assert index.largest_group() == max((g.rows for g in groups), default=0)


def test_ten_billion_rows_take_little_room_and_any_of_them_is_found_at_once():
    """10,000 files of 100 row groups; a tenth of them is uneven."""
    even, uneven = np.full(100, 10_000), np.array([9_999, 10_001] * 50)
    paths = [f"bucket/folder/part-{n:05d}-0123456789abcdef.parquet" for n in range(10_000)]
    summaries = [FileSummary(10**8, n.to_bytes(16, "big"), uneven if n % 10 == 3 else even) for n in range(10_000)]
    data = FileIndex.of(paths, summaries).to_bytes()
    assert len(data) < 500_000
    tracemalloc.start()
    index = FileIndex.from_bytes(data)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert (index.num_rows, index.num_groups, index.largest_group()) == (10**10, 10**6, 10_001)
    assert index.group_of(3_000_000 + 9_999) == Group(3, 1, 3_009_999, 10_001)
    assert index.group_of(10**10 - 1) == Group(9_999, 99, 10**10 - 10_000, 10_000)


@pytest.mark.parametrize("data", [b"", b"noise", b"ARROW1\0\0"])
def test_other_bytes_are_no_index(data):
    with pytest.raises((ValueError, OSError)):
        FileIndex.from_bytes(data)
