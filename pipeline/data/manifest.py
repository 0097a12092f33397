"""A data set is a Parquet table: id, media columns, text, labels. Rows are read by number, in any order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pyarrow as pa

from pipeline.data.columns import TIME_COLUMNS, TYPES, type_fault, usable, values
from pipeline.data.modalities import MEDIA
from pipeline.data.row_groups import RowGroups
from pipeline.data.row_index import RowIndex
from pipeline.data.row_table import Rows, RowTable
from pipeline.data.spec import DataSetSpec
from pipeline.errors import RequestError


def copy_rows(data_sets: Iterable[DataSetSpec]) -> None:
    """Makes the copies of rows that this machine lacks, before anything waits for the first of its samples."""
    for data_set in data_sets:
        if data_set.index is not None and data_set.index.copied:
            Manifest(data_set.manifest, media=data_set.media_columns, known=data_set.index).copy()


class Manifest:
    """Random access to the rows of one Parquet file or of all ``*.parquet`` files of a folder, sorted by name.

    media: columns of modalities that the recipe adds (``DataSetSpec.media_columns``). columns: that ``row`` needs, all
    by default. known: the rows as the run began with them. Raises RequestError if nothing is found, if it is not
    Parquet or has no rows; DataError, as reading a row does, if storage stays unreachable.
    """

    def __init__(
        self,
        uri: str,
        *,
        media: tuple[str, ...] = (),
        columns: Iterable[str] | None = None,
        known: RowIndex | None = None,
    ) -> None:
        self.uri = uri
        self.media = media
        self._source = Rows(uri, media, columns=columns, known=known)
        self.num_rows = self._source.num_rows
        if not self.num_rows:
            raise RequestError(f"manifest {uri}: expected rows, found none; remove the data set or fill it")

    @property
    def schema(self) -> pa.Schema:
        return self._source.files.schema

    @property
    def columns(self) -> list[str]:
        """The known columns whose values can be read."""
        return usable(self.schema, self.media)

    @property
    def _rows(self) -> RowTable | RowGroups:
        return self._source.opened

    def copy(self) -> None:
        """Makes the copy of the rows if this machine lacks it."""
        self._source.copy()

    @property
    def index(self) -> RowIndex | None:
        """The rows as other processes of a run open them; None if each of them reads the small manifest itself."""
        return self._source.index

    @property
    def fingerprint(self) -> dict:
        """Digests of the rows' ids, words and times, in their order (``columns.Fingerprint``)."""
        return self._rows.fingerprint

    def row(self, index: int) -> dict:
        """Row ``index`` as a dict, media columns as full paths or URIs.

        Text and labels are without nulls. Raises RequestError if the id is null.
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
        folder = self._source.folder
        full = f"{folder}/{path}" if folder else path
        scheme = self.uri.split("://", 1)[0] + "://" if "://" in self.uri else ""
        return scheme + full

    def batches(self, columns: tuple[str, ...], *, max_rows: int | None = None) -> Iterator[pa.RecordBatch]:
        """Some columns of all rows in order, in the types of ``columns.type_of`` and bounded pieces.

        max_rows: maximum number of rows, in pieces spread over the manifest; fewer if reading them would take long.
        """
        left = self.num_rows if max_rows is None else max_rows
        for batch in self._rows.batches(columns, max_rows=left):
            yield batch.slice(0, left)
            left -= len(batch)
            # Before the next one is read.
            if left <= 0:
                return

    def iter_column(self, column: str) -> Iterator:
        """Every value of one column in row order, as in ``row``; paths stay relative."""
        start = 0
        for batch in self.batches((column,)):
            found = batch.column(0)
            if column == "id" and found.null_count:
                raise self._no_id(start + found.is_null().index(True).as_py())
            yield from values(found, column)
            start += len(batch)

    def require(self, columns: dict[str, str]) -> None:
        """Raises RequestError if a column or an id is missing. columns: name → the task that needs it."""
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
