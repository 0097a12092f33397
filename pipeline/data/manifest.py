"""A data set is a Parquet table: id, media columns, text, labels. Rows are read by number, one row group at a time."""

from __future__ import annotations

import bisect
import functools
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from pipeline.errors import RequestError

MEDIA_COLUMNS = ("image", "video", "audio")
# Two windows of an order (``order.Order.window``): a window is read in random order, so its groups must all stay.
_CACHED_ROWS = 16_384


def _is_string(found: pa.DataType) -> bool:
    if pa.types.is_dictionary(found):
        found = found.value_type
    return pa.types.is_string(found) or pa.types.is_large_string(found)


def _is_strings(found: pa.DataType) -> bool:
    return (pa.types.is_list(found) or pa.types.is_large_list(found)) and _is_string(found.value_type)


_TYPES = dict.fromkeys(("id", *MEDIA_COLUMNS), ("a string", _is_string)) | dict.fromkeys(
    ("text", "labels"), ("a list of strings", _is_strings)
)


def resolve_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """(filesystem, path) of a local path or of a URI that pyarrow or fsspec knows."""
    if "://" not in uri:
        return pyarrow.fs.LocalFileSystem(), uri
    try:
        return pyarrow.fs.FileSystem.from_uri(uri)
    except pa.ArrowInvalid:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(uri)
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)), path


class Manifest:
    """Random access to the rows of one Parquet file or of all ``*.parquet`` files of a folder, sorted by name.

    Raises RequestError when nothing is there, when it is no Parquet, or when it has no rows.
    """

    def __init__(self, uri: str):
        self.uri = uri
        self.filesystem, path = resolve_filesystem(uri)
        self._files = self._list(path)
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
        self.schema = pq.read_schema(self._files[0], filesystem=self.filesystem)
        groups = -(-_CACHED_ROWS * len(self._groups) // self.num_rows)
        self._read = functools.lru_cache(maxsize=max(2, groups))(self._read_group)

    def _list(self, path: str) -> list[str]:
        info = self.filesystem.get_file_info(path)
        if info.type == pyarrow.fs.FileType.File:
            return [path]
        if info.type == pyarrow.fs.FileType.Directory:
            selector = pyarrow.fs.FileSelector(path, recursive=False)
            files = [i.path for i in self.filesystem.get_file_info(selector) if i.path.endswith(".parquet")]
            if files:
                return sorted(files)
        raise RequestError(f"manifest {self.uri}: expected a Parquet file or a folder of them, found nothing there")

    def _metadata(self, file: str):
        try:
            return pq.read_metadata(file, filesystem=self.filesystem)
        except (pa.ArrowInvalid, OSError) as e:
            raise RequestError(f"manifest {file}: expected a Parquet file: {str(e).splitlines()[0]}") from e

    def _read_group(self, number: int) -> pa.Table:
        file, group = self._groups[number]
        return pq.ParquetFile(file, filesystem=self.filesystem).read_row_group(group)

    def row(self, index: int) -> dict:
        """Row ``index`` as a dict, media columns as paths or URIs that ``media.open_media`` takes."""
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows} in {self.uri}")
        number = bisect.bisect_right(self._starts, index) - 1
        row = self._read(number).slice(index - self._starts[number], 1).to_pylist()[0]
        for column in MEDIA_COLUMNS:
            if row.get(column):
                row[column] = self.resolve(row[column])
        return row

    def resolve(self, path: str) -> str:
        """A path of the manifest, relative to its folder, as a full path or URI."""
        if "://" in path or path.startswith("/"):
            return path
        full = f"{self.folder}/{path}" if self.folder else path
        scheme = self.uri.split("://", 1)[0] + "://" if "://" in self.uri else ""
        return scheme + full

    def iter_column(self, column: str):
        """Every value of one column, in row order."""
        for file in self._files:
            for batch in pq.ParquetFile(file, filesystem=self.filesystem).iter_batches(columns=[column]):
                yield from batch.column(0).to_pylist()

    def require(self, columns: dict[str, str]) -> None:
        """Raises RequestError unless the columns are there; columns: name → which task needs it."""
        missing = {c: why for c, why in columns.items() if c not in self.schema.names}
        if missing:
            what = "; ".join(f"{c!r} (needed by {why})" for c, why in missing.items())
            raise RequestError(
                f"manifest {self.uri}: expected column {what}; found {', '.join(self.schema.names)}. "
                "Add the column or change the task"
            )
        for column in columns:
            found, wanted = self.schema.field(column).type, _TYPES[column]
            if not wanted[1](found):
                raise RequestError(f"manifest {self.uri}: column {column!r}: expected {wanted[0]}, found {found}")
