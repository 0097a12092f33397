"""Rows of a manifest that is too large for a copy: each is read with its row group, in place."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from pipeline.data.columns import Fingerprint, normalise, type_of, usable
from pipeline.data.parquet_files import ParquetFiles
from pipeline.errors import RequestError
from pipeline.files import cache_dir, write_json

# Suffix of the file that holds the fingerprint of such a manifest.
_FINGERPRINT = ".fingerprint.json"
# Maximum rows of a row group: all of them are decoded to read one.
_MAX_ROWS_PER_GROUP = 65_536
# Maximum row groups in memory.
_KEPT_GROUPS = 16
# Maximum files whose rows enter the fingerprint.
_SAMPLED_FILES = 64
# Maximum row groups read for a sample of the rows: each is a request to storage.
_MAX_SAMPLED_GROUPS = 512
T = TypeVar("T")


class RowGroups:
    """The rows of a manifest that is too large for a copy.

    The fingerprint is of all footers and of the rows of some row groups. Raises RequestError for large row groups.
    """

    def __init__(self, files: ParquetFiles):
        self._files, self._columns = files, usable(files.schema, files.media)
        self._starts = np.cumsum([0, *(rows for rows, _ in files.sizes)])
        self.num_rows = int(self._starts[-1])
        self._check_groups()
        self._group = functools.lru_cache(maxsize=_KEPT_GROUPS)(self._read_group)
        self._group_starts = functools.lru_cache(maxsize=_KEPT_GROUPS)(self._starts_of_groups)

    def _check_groups(self) -> None:
        rows, groups = max(self._files.sizes, key=lambda size: size[0] / max(1, size[1]))
        if rows > _MAX_ROWS_PER_GROUP * groups:
            raise RequestError(
                f"manifest {self._files.uri}: {self.num_rows} rows are too many for a copy, and reading them in "
                f"place takes row groups of at most {_MAX_ROWS_PER_GROUP} rows, found {rows // groups}; write the "
                "manifest with row_group_size=1024"
            )

    def row(self, index: int) -> pa.RecordBatch:
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        path, within = self._files.paths[file], index - int(self._starts[file])
        starts = self._group_starts(path)
        number = int(np.searchsorted(starts, within, side="right")) - 1
        return self._group(path, number).slice(within - int(starts[number]), 1)

    def _starts_of_groups(self, path: str) -> np.ndarray:
        footer = self._files.footer(path)
        return np.cumsum([0, *(footer.row_group(n).num_rows for n in range(footer.num_row_groups))])

    def _read_group(self, path: str, number: int, columns: list[str] | None = None) -> pa.RecordBatch:
        columns = columns or self._columns
        pieces = [normalise(p, columns) for p in self._files.group(path, number, columns).to_batches()]
        if not pieces:  # it has no rows
            return pa.RecordBatch.from_pylist([], schema=pa.schema([(name, type_of(name)) for name in columns]))
        return one_batch(pa.Table.from_batches(pieces))

    def batches(self, columns: Iterable[str], *, max_rows: int | None = None) -> Iterator[pa.RecordBatch]:
        names = list(columns)
        if max_rows is None or max_rows >= self.num_rows:
            return (normalise(piece, names) for piece in self._files.pieces(names))
        firsts = np.cumsum([0, *(groups for _, groups in self._files.sizes)])
        wanted = min(_MAX_SAMPLED_GROUPS, -(-max_rows * int(firsts[-1]) // self.num_rows))
        return (self._some_group(firsts, number, names) for number in spread(int(firsts[-1]), wanted))

    def _some_group(self, firsts: np.ndarray, number: int, columns: list[str]) -> pa.RecordBatch:
        """The number-th row group of all files."""
        file = int(np.searchsorted(firsts, number, side="right")) - 1
        return self._read_group(self._files.paths[file], number - int(firsts[file]), columns)

    def has_null_ids(self) -> bool:
        """False: checking all ids would take too long. A row without one is an error when it is read."""
        return False

    @functools.cached_property
    def fingerprint(self) -> dict:
        return made_once(copy_path(self._files).with_suffix(_FINGERPRINT), self._take_fingerprint)

    def _take_fingerprint(self) -> dict:
        sample = Fingerprint()
        for file in np.unique(np.linspace(0, len(self._files.paths) - 1, _SAMPLED_FILES).astype(int)):
            groups = self._files.sizes[file][1]
            if groups:
                sample.update(self._read_group(self._files.paths[file], groups // 2))
        return sample.digests() | {"num_rows": self.num_rows, "footers": self._files.footers_digest()}


def copy_path(files: ParquetFiles) -> Path:
    return cache_dir() / "manifests" / f"{files.stamp()}.arrow"


def made_once(path: Path, make: Callable[[], T]) -> T:
    """The result of ``make``, from the cache if an earlier process of this machine has stored it."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_bytes())
    value = make()
    # If the disk is full, it is computed again next time.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, value)
    return value


def spread(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` numbers below ``count``, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(int)).tolist()


def one_batch(table: pa.Table) -> pa.RecordBatch:
    return table.combine_chunks().to_batches()[0]
