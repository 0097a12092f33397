"""Rows of a manifest that is too large for a copy: each is read with its row group, in place."""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from pipeline.data.columns import Fingerprint, normalise, type_of, usable
from pipeline.data.order import substitutes_of
from pipeline.data.parquet_files import ParquetFiles
from pipeline.data.row_index import RowIndex
from pipeline.errors import RequestError
from pipeline.files import cache_dir, write_json

# Suffix of the file that holds the fingerprint of such a manifest.
FINGERPRINT = ".fingerprint.json"
# Maximum rows of a row group: all of them are decoded to read one.
_MAX_ROWS_PER_GROUP = 16_384
# Maximum bytes of row groups that a process keeps, of all its streams together, beside the last one: a sample is read
# in several steps and its substitutes are near it. The next sample is in another group anyway.
_KEPT_BYTES = 32 << 20
# Maximum files whose rows enter the fingerprint.
_SAMPLED_FILES = 64
# Maximum row groups read for a sample of the rows: each is a request to storage.
_MAX_SAMPLED_GROUPS = 512
T = TypeVar("T")


class GroupCache:
    """The row groups that were read last, least recently used first out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: collections.OrderedDict[tuple, pa.RecordBatch] = collections.OrderedDict()
        self._bytes = 0

    def get(self, key: tuple, read: Callable[[], pa.RecordBatch]) -> pa.RecordBatch:
        """The group of a key, read if it is not kept."""
        with self._lock:
            if (found := self._groups.get(key)) is not None:
                self._groups.move_to_end(key)
                return found
        found = read()
        with self._lock:
            if key not in self._groups:
                self._groups[key] = found
                self._bytes += found.nbytes
            while self._bytes > _KEPT_BYTES and len(self._groups) > 1:
                self._bytes -= self._groups.popitem(last=False)[1].nbytes
        return found


_CACHE = GroupCache()


class RowGroups:
    """The rows of a manifest that is too large for a copy.

    columns: to read, all known ones by default. known: index of the rows as the run began with them. The fingerprint
    is of all footers and of the rows of some row groups. Raises RequestError for large row groups.
    """

    def __init__(
        self, files: ParquetFiles, *, columns: tuple[str, ...] | None = None, known: RowIndex | None = None
    ) -> None:
        self._files, self._index, self._known = files, files.index, known
        self._only = columns
        self.num_rows = self._index.num_rows
        self._check_groups()
        # Streams of one run share what they read; another look at the files shares nothing.
        self._identity = known.stamp if known else object()

    @functools.cached_property
    def _columns(self) -> list[str]:
        found = usable(self._files.schema, self._files.media)
        return [name for name in found if self._only is None or name in self._only]

    def _check_groups(self) -> None:
        found = self._index.largest_group()
        if found > _MAX_ROWS_PER_GROUP:
            raise RequestError(
                f"manifest {self._files.uri}: {self.num_rows} rows are too many for a copy, and reading them in "
                f"place takes row groups of at most {_MAX_ROWS_PER_GROUP} rows, found {found}; write the manifest with "
                f"row_group_size=4096, e.g. by python -m pipeline.data.regroup {self._files.uri} FOLDER"
            )

    def row(self, index: int) -> pa.RecordBatch:
        """A record batch of one row."""
        file, number, first, _ = self._index.group_of(index)
        key = (self._identity, file, number, *self._columns)
        return _CACHE.get(key, lambda: self._read_group(file, number)).slice(index - first, 1)

    def _read_group(self, file: int, number: int, columns: tuple[str, ...] | None = None) -> pa.RecordBatch:
        names = list(columns or self._columns)
        pieces = [normalise(p, names) for p in self._files.group(self._index.paths[file], number, names).to_batches()]
        if not pieces:  # it has no rows
            return pa.RecordBatch.from_pylist([], schema=pa.schema([(name, type_of(name)) for name in names]))
        return one_batch(pa.Table.from_batches(pieces))

    def batches(self, columns: Iterable[str], *, max_rows: int | None = None) -> Iterator[pa.RecordBatch]:
        """Some columns of all rows in order. max_rows: only evenly spread row groups with about this number of rows."""
        names = tuple(columns)
        if max_rows is None or max_rows >= self.num_rows:
            return (normalise(piece, list(names)) for piece in self._files.pieces(list(names)))
        wanted = min(_MAX_SAMPLED_GROUPS, -(-max_rows * self._index.num_groups // self.num_rows))
        groups = (self._index.group(number) for number in spread(self._index.num_groups, wanted))
        return (self._read_group(group.file, group.number, names) for group in groups)

    def has_null_ids(self) -> bool:
        """False: checking all ids would take too long. A row without one is an error when it is read."""
        return False

    @functools.cached_property
    def fingerprint(self) -> dict:
        """Digests of the footers and of some rows."""
        if self._known is not None:
            return self._known.fingerprint
        path = copy_path(self._files.stamp()).with_suffix(FINGERPRINT)
        return made_once(path, self._take_fingerprint) | substitutes_of(self.num_rows)

    def _take_fingerprint(self) -> dict:
        sample, all_columns = Fingerprint(), tuple(usable(self._files.schema, self._files.media))
        for file in np.unique(np.linspace(0, len(self._index.paths) - 1, _SAMPLED_FILES).astype(int)).tolist():
            groups = self._index.file_groups(file)
            if groups:
                sample.update(self._read_group(file, groups // 2, all_columns))
        return sample.digests() | {"num_rows": self.num_rows, "footers": self._index.footers_digest()}


def copy_path(stamp: str) -> Path:
    """The path of the copy of a manifest in the cache. stamp: of its files."""
    return cache_dir() / "manifests" / f"{stamp}.arrow"


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


def equal_batches(pieces: Iterable[pa.RecordBatch], num_rows: int) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of a size, the last one shorter."""
    held, rows = [], 0
    for piece in pieces:
        held.append(piece)
        rows += len(piece)
        if rows < num_rows:
            continue
        table, start = pa.Table.from_batches(held), 0
        while rows - start >= num_rows:
            yield one_batch(table.slice(start, num_rows))
            start += num_rows
        held, rows = table.slice(start).to_batches(), rows - start
    if rows:
        yield one_batch(pa.Table.from_batches(held))
