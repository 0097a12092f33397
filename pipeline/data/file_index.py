"""The files of a manifest, their row groups and first rows: one table, made once and read without opening any file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa

_SCHEMA = pa.schema(
    [
        ("path", pa.large_string()),
        ("bytes", pa.int64()),
        ("footer", pa.binary(16)),
        # Nanoseconds since 1970; null where the storage does not tell.
        ("modified", pa.int64()),
        ("rows", pa.int64()),
        ("groups", pa.int64()),
        # Rows of each row group; of groups of equal size, the last one shorter, the first alone.
        ("group_rows", pa.list_(pa.int64())),
    ]
)


class FileSummary(NamedTuple):
    """A file's size, the digest of its footer, the rows of each of its row groups, and its time in nanoseconds."""

    bytes: int
    footer: bytes
    group_rows: np.ndarray
    modified: int | None = None


class Group(NamedTuple):
    """A row group: its file and its number there, the first of its rows in the manifest, and how many it has."""

    file: int
    number: int
    first: int
    rows: int


class FileIndex:
    """The files of a manifest in the order of their rows. Memory: some 200 bytes a file, 8 a row group of uneven size.

    paths, bytes, footers, modified: of each file. num_rows, num_groups: of all.
    """

    def __init__(self, table: pa.Table) -> None:
        self._table = table.combine_chunks()
        self.paths: list[str] = table["path"].to_pylist()
        self.bytes: list[int] = table["bytes"].to_pylist()
        self.footers: list[bytes] = table["footer"].to_pylist()
        self.modified: list[int | None] = table["modified"].to_pylist()
        self._starts = np.cumsum([0, *table["rows"].to_pylist()])
        self._groups = np.cumsum([0, *table["groups"].to_pylist()])
        self.num_rows, self.num_groups = int(self._starts[-1]), int(self._groups[-1])
        layouts = table["group_rows"].combine_chunks() if len(table) else pa.array([], _SCHEMA.field("group_rows").type)
        self._layouts = layouts.flatten().to_numpy()
        # Of each file's layout within those of all; and the sum of all rows before each of their values.
        self._places = np.cumsum([0, *layouts.value_lengths().to_pylist()])
        self._sums = np.concatenate([[0], np.cumsum(self._layouts)])

    @classmethod
    def of(cls, paths: list[str], summaries: Iterable[FileSummary]) -> FileIndex:
        """The index of files. paths: in the order of their rows."""
        rows = [
            [path, s.bytes, s.footer, s.modified, int(s.group_rows.sum()), len(s.group_rows), _layout(s.group_rows)]
            for path, s in zip(paths, summaries, strict=True)
        ]
        columns = zip(*rows, strict=True) if rows else [[] for _ in _SCHEMA]
        return cls(pa.table([pa.array(c, f.type) for c, f in zip(columns, _SCHEMA, strict=True)], schema=_SCHEMA))

    @classmethod
    def from_bytes(cls, data: bytes) -> FileIndex:
        """Reads the result of ``to_bytes``. Raises ValueError for other bytes."""
        table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
        if table.schema != _SCHEMA:
            raise ValueError(f"expected {_SCHEMA.names}, found {table.schema.names}")
        return cls(table)

    def to_bytes(self) -> bytes:
        """The whole index, compressed."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, _SCHEMA, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(self._table)
        return sink.getvalue().to_pybytes()

    def footers_digest(self) -> str:
        """A digest of all footers, in order."""
        return hashlib.blake2b(b"".join(self.footers), digest_size=16).hexdigest()

    def group_of(self, row: int) -> Group:
        """The row group that holds a row of the manifest."""
        file = int(np.searchsorted(self._starts, row, side="right")) - 1
        within, even = row - int(self._starts[file]), self._even(file)
        if even:
            return self._group(file, within // even)
        sums = self._sums[self._places[file] : self._places[file + 1] + 1]
        return self._group(file, int(np.searchsorted(sums, within + sums[0], side="right")) - 1)

    def group(self, number: int) -> Group:
        """The row group with a number among those of all files."""
        file = int(np.searchsorted(self._groups, number, side="right")) - 1
        return self._group(file, number - int(self._groups[file]))

    def file_groups(self, file: int) -> int:
        """The number of row groups of a file."""
        return int(self._groups[file + 1] - self._groups[file])

    def largest_group(self) -> int:
        """The number of rows of the largest row group."""
        return int(self._layouts.max(initial=0))

    def _group(self, file: int, number: int) -> Group:
        start, even = int(self._starts[file]), self._even(file)
        if even:
            first = number * even
            return Group(file, number, start + first, min(even, int(self._starts[file + 1]) - start - first))
        place = int(self._places[file]) + number
        first = int(self._sums[place] - self._sums[self._places[file]])
        return Group(file, number, start + first, int(self._layouts[place]))

    def _even(self, file: int) -> int:
        """The rows of each of a file's row groups but the last; 0 if they differ."""
        place = int(self._places[file])
        return int(self._layouts[place]) if self._places[file + 1] - place == 1 else 0


def _layout(group_rows: np.ndarray) -> np.ndarray:
    even = len(group_rows) > 1 and (group_rows[:-1] == group_rows[0]).all() and 0 < group_rows[-1] <= group_rows[0]
    return group_rows[:1] if even else group_rows
