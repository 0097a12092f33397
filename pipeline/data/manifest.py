"""A data set is a Parquet table: id, media columns, text, labels. Rows are read by number, in any order."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pyarrow as pa

from pipeline.data.columns import TIME_COLUMNS, TYPES, type_fault, usable, values
from pipeline.data.modalities import MEDIA
from pipeline.data.parquet_files import ParquetFiles
from pipeline.data.row_table import RowGroups, RowTable, existing_rows, open_rows
from pipeline.errors import RequestError


class Manifest:
    """Random access to the rows of one Parquet file or of all ``*.parquet`` files of a folder, sorted by name.

    media: columns of modalities that the recipe adds (``DataSetSpec.media_columns``). Raises RequestError if nothing is
    found, if it is not Parquet or has no rows; DataError, as reading a row does, if storage stays unreachable.
    """

    def __init__(self, uri: str, *, media: tuple[str, ...] = ()):
        self.uri = uri
        self.media = media
        self._files = ParquetFiles(uri, media)
        self._existing = existing_rows(self._files)
        self.num_rows = (self._existing or self._files).num_rows
        if not self.num_rows:
            raise RequestError(f"manifest {uri}: expected rows, found none; remove the data set or fill it")

    @property
    def schema(self) -> pa.Schema:
        return self._files.schema

    @property
    def columns(self) -> list[str]:
        """The known columns whose values can be read."""
        return usable(self.schema, self.media)

    @functools.cached_property
    def _rows(self) -> RowTable | RowGroups:
        return self._existing or open_rows(self._files)

    @property
    def fingerprint(self) -> dict:
        """Digests of the rows' ids, words and times, in their order (``columns.Fingerprint``)."""
        return self._rows.fingerprint

    def row(self, index: int) -> dict:
        """Row ``index`` as a dict, media columns as paths or URIs that ``media.open_media`` takes.

        Text and labels are without nulls. Raises RequestError where the id is null.
        """
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows} in {self.uri}")
        found = self._rows.row(index)
        row = {name: values(column, name)[0] for name, column in zip(found.schema.names, found.columns, strict=True)}
        if row.get("id", "") is None:
            raise self._no_id(index)
        for column in (*MEDIA, *self.media):
            if row.get(column):
                row[column] = self.resolve(row[column])
        return row

    def _no_id(self, index: int) -> RequestError:
        return RequestError(f"manifest {self.uri}: row {index}: expected an id, found null; give every row its own")

    def resolve(self, path: str) -> str:
        """A path of the manifest, relative to its folder, as a full path or URI."""
        if "://" in path or path.startswith("/"):
            return path
        full = f"{self._files.folder}/{path}" if self._files.folder else path
        scheme = self.uri.split("://", 1)[0] + "://" if "://" in self.uri else ""
        return scheme + full

    def batches(self, columns: tuple[str, ...], *, most_rows: int | None = None) -> Iterator[pa.RecordBatch]:
        """Some columns of all rows in order, in the types of ``columns.TYPES`` and bounded pieces.

        most_rows: of that many rows, or fewer where reading them takes long, in pieces from all over the manifest.
        """
        left = self.num_rows if most_rows is None else most_rows
        for batch in self._rows.batches(columns, most_rows=left):
            yield batch.slice(0, left)
            left -= len(batch)
            # Before the next one is read.
            if left <= 0:
                return

    def iter_column(self, column: str):
        """Every value of one column, in row order, as ``row`` gives it but for paths: they stay relative."""
        start = 0
        for batch in self.batches((column,)):
            found = batch.column(0)
            if column == "id" and found.null_count:
                raise self._no_id(start + found.is_null().index(True).as_py())
            yield from values(found, column)
            start += len(batch)

    def require(self, columns: dict[str, str]) -> None:
        """Raises RequestError unless the columns are there, and every id; columns: name → which task needs it."""
        missing = {c: why for c, why in columns.items() if c not in self.schema.names}
        if missing:
            what = "; ".join(f"{c!r} (needed by {why})" for c, why in missing.items())
            raise RequestError(
                f"manifest {self.uri}: expected column {what}; found {', '.join(self.schema.names)}. "
                "Add the column or change the task"
            )
        for column in (*columns, *(c for c in TIME_COLUMNS if c in self.schema.names)):
            known = column in TYPES or column in self.media
            fault = type_fault(column, self.schema.field(column).type) if known else None
            if fault:
                raise RequestError(f"manifest {self.uri}: column {column!r}: {fault}")
        if "id" in columns and self._rows.has_null_ids():
            for _ in self.iter_column("id"):  # raises at the first null
                pass
