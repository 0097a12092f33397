"""A data set is a Parquet table: id, media columns, text, labels. Rows are read by number, one row group at a time."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterator
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from pipeline.data.media.storage import patiently, resolve_filesystem
from pipeline.errors import RequestError

MEDIA_COLUMNS = ("image", "video", "audio")
# Two windows of an order (``order.Order.window``): a window is read in random order, so its groups must all stay.
_CACHED_ROWS = 16_384
# Stands before what is shown of a text or label whose bytes are no UTF-8. A noncharacter: Unicode keeps it for a
# program's own use, and it passes through Arrow as any other.
NOT_UTF8 = "\ufdd0"
_WORD_COLUMNS = ("text", "labels")
_TIME_COLUMNS = ("start_s", "end_s")
_MOST_SHOWN = 80
# Rows of a batch that ``scan`` gives.
_SCANNED_ROWS = 1 << 16


def _is_string(found: pa.DataType) -> bool:
    if pa.types.is_dictionary(found):
        found = found.value_type
    return pa.types.is_string(found) or pa.types.is_large_string(found)


def _is_strings(found: pa.DataType) -> bool:
    return (pa.types.is_list(found) or pa.types.is_large_list(found)) and _is_string(found.value_type)


def _is_number(found: pa.DataType) -> bool:
    return pa.types.is_floating(found) or pa.types.is_integer(found) or pa.types.is_decimal(found)


_TYPES = (
    dict.fromkeys(("id", *MEDIA_COLUMNS), ("a string", _is_string))
    | dict.fromkeys(_WORD_COLUMNS, ("a list of strings", _is_strings))
    | dict.fromkeys(_TIME_COLUMNS, ("a number of seconds", _is_number))
)


def _values(column: pa.Array | pa.ChunkedArray, name: str) -> list:
    """``to_pylist``, where strings may hold other bytes than UTF-8: texts and labels are marked by ``NOT_UTF8``.

    Ids and paths keep their readable part and show the other bytes as "\\xff". Columns of other types become nulls.
    """
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        raw = pa.large_list(pa.large_binary()) if _is_strings(column.type) else pa.large_binary()
        try:
            return [_readable(value, marked=name in _WORD_COLUMNS) for value in column.cast(raw).to_pylist()]
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            return [None] * len(column)


def _readable(value: bytes | list | None, *, marked: bool):
    if isinstance(value, list):
        return [_readable(v, marked=marked) for v in value]
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        # Ids stay whole, so that they stay different.
        return (NOT_UTF8 if marked else "") + value[: _MOST_SHOWN if marked else None].decode(errors="backslashreplace")


def _without_nulls(words: list | None) -> list | None:
    return [w for w in words if w is not None] if words and None in words else words


class Manifest:
    """Random access to the rows of one Parquet file or of all ``*.parquet`` files of a folder, sorted by name.

    Raises RequestError when nothing is there, when it is no Parquet, or when it has no rows; DataError, as reading a
    row does, when storage stays out of reach.
    """

    def __init__(self, uri: str):
        self.uri = uri
        self.filesystem, path = patiently(uri, lambda: resolve_filesystem(uri))
        self._files = patiently(uri, lambda: self._list(path))
        self.folder = str(PurePosixPath(path).parent) if self._files == [path] else path
        self._groups, self._starts, self.num_rows = [], [], 0
        for file in self._files:
            metadata = self._metadata(file)
            for group in range(metadata.num_row_groups):
                self._groups.append((file, group))
                self._starts.append(self.num_rows)
                self.num_rows += metadata.row_group(group).num_rows
        if not self.num_rows:
            raise RequestError(f"manifest {uri}: expected rows, found none; remove the data set or fill it")
        self.schema = self._metadata(self._files[0]).schema.to_arrow_schema()
        groups = -(-_CACHED_ROWS * len(self._groups) // self.num_rows)
        self._read = functools.lru_cache(maxsize=max(2, groups))(self._read_group)

    def _list(self, path: str) -> list[str]:
        try:
            info = self.filesystem.get_file_info(path)
        except pa.ArrowInvalid as e:
            raise RequestError(f"manifest {self.uri}: {e}") from e
        if info.type == pyarrow.fs.FileType.File:
            return [path]
        if info.type == pyarrow.fs.FileType.Directory:
            selector = pyarrow.fs.FileSelector(path, recursive=False)
            files = [i.path for i in self.filesystem.get_file_info(selector) if i.path.endswith(".parquet")]
            if files:
                return sorted(files)
        raise RequestError(f"manifest {self.uri}: expected a Parquet file or a folder of them, found nothing there")

    def _metadata(self, file: str):
        def read():
            try:
                return pq.read_metadata(file, filesystem=self.filesystem)
            except pa.ArrowInvalid as e:
                raise RequestError(f"manifest {file}: expected a Parquet file: {str(e).splitlines()[0]}") from e

        return patiently(file, read)

    def _read_group(self, number: int, columns: list[str] | None = None) -> pa.Table:
        file, group = self._groups[number]
        return patiently(
            file, lambda: pq.ParquetFile(file, filesystem=self.filesystem).read_row_group(group, columns=columns)
        )

    def row(self, index: int) -> dict:
        """Row ``index`` as a dict, media columns as paths or URIs that ``media.open_media`` takes.

        Text and labels are without nulls. Raises RequestError where the id is null.
        """
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows} in {self.uri}")
        number = bisect.bisect_right(self._starts, index) - 1
        found = self._read(number).slice(index - self._starts[number], 1)
        try:
            row = found.to_pylist()[0]
        except UnicodeDecodeError:
            row = {name: _values(found[name], name)[0] for name in found.column_names}
        if row.get("id", "") is None:
            raise self._no_id(index)
        for column in _WORD_COLUMNS:
            if column in row:
                row[column] = _without_nulls(row[column])
        for column in _TIME_COLUMNS:
            if row.get(column) is not None:
                row[column] = float(row[column])
        for column in MEDIA_COLUMNS:
            if row.get(column):
                row[column] = self.resolve(row[column])
        return row

    def _no_id(self, index: int) -> RequestError:
        return RequestError(f"manifest {self.uri}: row {index}: expected an id, found null; give every row its own")

    def resolve(self, path: str) -> str:
        """A path of the manifest, relative to its folder, as a full path or URI."""
        if "://" in path or path.startswith("/"):
            return path
        full = f"{self.folder}/{path}" if self.folder else path
        scheme = self.uri.split("://", 1)[0] + "://" if "://" in self.uri else ""
        return scheme + full

    def iter_column(self, column: str):
        """Every value of one column, in row order, as ``row`` gives it but for paths: they stay relative."""
        for number, start in enumerate(self._starts):
            values = _values(self._read_group(number, [column]).column(0), column)
            if column == "id" and None in values:
                raise self._no_id(start + values.index(None))
            yield from (map(_without_nulls, values) if column in _WORD_COLUMNS else values)

    def scan(self, columns: list[str], *, most_rows: int | None = None) -> Iterator[tuple[int, pa.RecordBatch]]:
        """(number of its first row, batch of these columns), as stored: paths are relative, nulls are there.

        most_rows: with more rows than that, row groups spread evenly over the manifest, up to so many rows in all.
        """
        left, numbers = self.num_rows if most_rows is None else most_rows, range(len(self._groups))
        if self.num_rows > left:
            numbers = np.unique(
                np.linspace(0, len(numbers) - 1, max(1, left * len(numbers) // self.num_rows)).astype(int)
            )
        for number in numbers:
            for first, batch in self._group_batches(number, columns):
                if left <= 0:
                    return
                yield first, batch.slice(0, left)
                left -= batch.num_rows

    def _group_batches(self, number: int, columns: list[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        """(number of its first row, batch) of one row group; of a large one, a part is in memory at a time."""
        first, (file, group) = self._starts[number], self._groups[number]
        opened = patiently(file, lambda: pq.ParquetFile(file, filesystem=self.filesystem))
        batches = opened.iter_batches(batch_size=_SCANNED_ROWS, row_groups=[group], columns=columns)
        while (batch := patiently(file, lambda: next(batches, None))) is not None:
            yield first, batch
            first += batch.num_rows

    def some_rows(self, columns: list[str], *, groups: int, rows: int) -> list[dict]:
        """These columns of ``rows`` rows, evenly spread, of each of ``groups`` row groups, evenly spread."""
        out = []
        for number in np.unique(np.linspace(0, len(self._groups) - 1, groups).astype(int)):
            end = self._starts[number + 1] if number + 1 < len(self._starts) else self.num_rows
            wanted = np.unique(np.linspace(self._starts[number], end - 1, rows).astype(int))
            for first, batch in self._group_batches(number, columns):
                batch = batch.take(pa.array(wanted[(wanted >= first) & (wanted < first + len(batch))] - first))
                names = batch.schema.names
                values = [_values(batch.column(name), name) for name in names]
                out += [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]
        return out

    def require(self, columns: dict[str, str]) -> None:
        """Raises RequestError unless the columns are there, and every id; columns: name → which task needs it."""
        missing = {c: why for c, why in columns.items() if c not in self.schema.names}
        if missing:
            what = "; ".join(f"{c!r} (needed by {why})" for c, why in missing.items())
            raise RequestError(
                f"manifest {self.uri}: expected column {what}; found {', '.join(self.schema.names)}. "
                "Add the column or change the task"
            )
        for column in (*columns, *(c for c in _TIME_COLUMNS if c in self.schema.names)):
            found, wanted = self.schema.field(column).type, _TYPES[column]
            if not wanted[1](found):
                raise RequestError(f"manifest {self.uri}: column {column!r}: expected {wanted[0]}, found {found}")
        if "id" in columns and self._counts_null_ids():
            for _ in self.iter_column("id"):  # raises at the first null
                pass

    def _counts_null_ids(self) -> bool:
        """What the files' statistics say of nulls; a file without them tells at the row, when it is read."""
        for file in self._files:
            metadata = self._metadata(file)
            paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
            for group in range(metadata.num_row_groups if "id" in paths else 0):
                statistics = metadata.row_group(group).column(paths.index("id")).statistics
                if statistics is not None and statistics.null_count:
                    return True
        return False
