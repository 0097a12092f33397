"""quarantine.parquet: the journal of rejects as a table for people and tools."""

from __future__ import annotations

import contextlib
import itertools
import json
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.files import whole_file
from pipeline.store.path import run_path
from pipeline.train.quarantine import journal_files, read_journal

_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("id", "data_set", "source", "reason", "detail", "task")] + [("step", pa.int64())]
)
# Rows that are in memory at a time.
_GROUP_ROWS = 16_384


def write_table(run_dir: Path) -> Path:
    """Writes one row for each rejected sample and reason, at its first step; no rows without rejects.

    The rows themselves are read a second time, in order of the steps: of each reject 32 bytes are held.
    """
    path, journals = run_path(run_dir) / "quarantine.parquet", journal_files(run_dir)
    rows = _records(journals, *_first_places(journals))
    with whole_file(path) as temporary, pq.ParquetWriter(temporary, _SCHEMA) as table:
        while group := list(itertools.islice(rows, _GROUP_ROWS)):
            table.write_table(pa.Table.from_pylist(group, schema=_SCHEMA))
    return path


def _first_places(journals: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """(the index of the journal, the place in it) of the first record of each sample and reason, by step."""
    keys, steps, files, places = array("q"), array("q"), array("q"), array("q")
    for number, journal in enumerate(journals):
        for place, record in read_journal(journal):
            keys.append(hash((record["data_set"], record["id"], record["reason"])))
            for column, value in ((steps, record["step"]), (files, number), (places, place)):
                column.append(value)
    if not keys:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    by_step = np.argsort(np.frombuffer(steps, np.int64), kind="stable")
    _, first = np.unique(np.frombuffer(keys, np.int64)[by_step], return_index=True)
    chosen = by_step[np.sort(first)]
    return np.frombuffer(files, np.int64)[chosen], np.frombuffer(places, np.int64)[chosen]


def _records(journals: list[Path], files: np.ndarray, places: np.ndarray) -> Iterator[dict]:
    """The records at the given places, one after the other."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(path.open("rb")) for path in journals]
        for number, place in zip(files.tolist(), places.tolist(), strict=True):
            opened[number].seek(place)
            yield json.loads(opened[number].readline())
