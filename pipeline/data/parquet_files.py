"""The Parquet files of a manifest: listed, their footers read when asked for, their rows streamed in bounded pieces.

Tells damage from unreachable storage: if reading a file fails, it is read again through a file object that notes every
failure of the storage. Without such a failure the file is damaged, and retrying is useless.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import TypeVar

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from pipeline.commands import command
from pipeline.data.columns import TYPES, type_fault
from pipeline.data.media.storage import resolve_filesystem, with_retries
from pipeline.errors import RequestError, one_line
from pipeline.ray_job import upload_hint

# Rows of a piece of a stream.
_ROWS_PER_PIECE = 16_384
# Maximum footers in memory; a data set may have many files.
_KEPT_FOOTERS = 64
_LISTING_THREADS = 16
# Names under which file systems of fsspec give a file's time, checksum or version.
_VERSION = re.compile(r"etag|md5|sha|digest|checksum|crc|modified|created|updated|mtime|version|blob_id", re.IGNORECASE)
T = TypeVar("T")


class ParquetFiles:
    """One Parquet file, or all ``*.parquet`` files of a folder, sorted by name. media: columns of added modalities.

    Raises RequestError if nothing is found or a file is not valid Parquet, DataError if storage stays unreachable.
    """

    def __init__(self, uri: str, media: tuple[str, ...] = ()):
        self.uri = uri
        self.media = media
        self.filesystem, path = with_retries(uri, lambda: resolve_filesystem(uri))
        self.infos = with_retries(uri, lambda: self._list(path))
        self.paths = [info.path for info in self.infos]
        self.folder = str(PurePosixPath(path).parent) if self.paths == [path] else path
        self.footer = functools.lru_cache(maxsize=_KEPT_FOOTERS)(self._footer)
        self._types = functools.lru_cache(maxsize=_KEPT_FOOTERS)(self._file_types)

    def _list(self, path: str) -> list[pyarrow.fs.FileInfo]:
        try:
            info = self.filesystem.get_file_info(path)
        except pa.ArrowInvalid as e:
            raise RequestError(f"manifest {self.uri}: {e}") from e
        if info.type == pyarrow.fs.FileType.File:
            return [info]
        if info.type == pyarrow.fs.FileType.Directory:
            selector = pyarrow.fs.FileSelector(path, recursive=False)
            files = [i for i in self.filesystem.get_file_info(selector) if i.path.endswith(".parquet")]
            if files:
                return sorted(files, key=lambda i: i.path)
        raise RequestError(
            f"manifest {self.uri}: expected a Parquet file or a folder of them, found nothing there; correct the path, "
            f"or write one with {command('import')}{upload_hint(self.uri)}"
        )

    def stamp(self) -> str:
        """A digest of the files' names, sizes, times and versions, without reading them."""
        digest = hashlib.blake2b(self.uri.encode(), digest_size=16)
        # Copies hold these columns too.
        digest.update("".join(f" {column}" for column in self.media).encode())
        for info, version in zip(self.infos, self._versions(), strict=True):
            digest.update(repr([info.path, info.size, info.mtime_ns, version]).encode())
        return digest.hexdigest()

    def _versions(self) -> list:
        """For each file, whatever else changes with its content beside size and time."""
        if isinstance(self.filesystem, pyarrow.fs.LocalFileSystem):
            return [_local_version(path) for path in self.paths]
        if all(info.mtime_ns is not None for info in self.infos):
            return [()] * len(self.infos)
        # For fsspec's file systems (the web, hubs) pyarrow passes on only names and sizes.
        if isinstance(self.filesystem, pyarrow.fs.PyFileSystem):
            ask = self.filesystem.handler.fs.info
            found = self._of_each(lambda path: _version(with_retries(path, lambda: ask(path))))
            if all(found):
                return found
        return [self.footers_digest()] * len(self.infos)

    @functools.cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """(rows, row groups) of each file."""
        few = len(self.paths) <= _KEPT_FOOTERS

        def size(path: str) -> tuple[int, int]:
            footer = self.footer(path) if few else self._footer(path)
            return footer.num_rows, footer.num_row_groups

        return self._of_each(size)

    def _of_each(self, look: Callable[[str], T]) -> list[T]:
        """``look`` of each file; several at a time, to hide the latency of storage."""
        with concurrent.futures.ThreadPoolExecutor(_LISTING_THREADS) as threads:
            return list(threads.map(look, self.paths))

    @property
    def num_rows(self) -> int:
        return sum(rows for rows, _ in self.sizes)

    @property
    def num_bytes(self) -> int:
        return sum(info.size or 0 for info in self.infos)

    @property
    def schema(self) -> pa.Schema:
        """The schema of the first file."""
        return pa.schema(list(self._types(self.paths[0]).items()))

    def _footer(self, path: str) -> pq.FileMetaData:
        return self._read(path, lambda file: pq.read_metadata(file))

    def pieces(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """The rows of all files in order, one row group in memory at a time."""
        for path in self.paths:
            for number in range(self.footer(path).num_row_groups):
                yield from self.group(path, number, columns).to_batches(_ROWS_PER_PIECE)

    def group(self, path: str, number: int, columns: list[str]) -> pa.Table:
        """One row group, of the columns that the file has."""
        footer, here = self.footer(path), self._here(path, columns)

        def read(file: pa.NativeFile) -> pa.Table:
            return pq.ParquetFile(file, metadata=footer, page_checksum_verification=True).read_row_group(number, here)

        return self._read(path, read, what=f", row group {number}")

    def _here(self, path: str, columns: list[str]) -> list[str]:
        """The columns that the file has. Raises RequestError for one of a wrong type."""
        types = self._types(path)
        here = [name for name in columns if name in types]
        for name in here:
            if fault := type_fault(name, types[name]):
                raise RequestError(f"manifest {path}: column {name!r}: {fault}")
        return here

    def _file_types(self, path: str) -> dict[str, pa.DataType]:
        """Column → type. Raises RequestError if one appears twice."""
        schema = self.footer(path).schema.to_arrow_schema()
        for name in (*TYPES, *self.media):
            count = schema.names.count(name)
            if count > 1:
                raise RequestError(f"manifest {path}: column {name!r} appears {count} times; keep one of them")
        return {field.name: field.type for field in schema}

    def footers_digest(self) -> str:
        """A digest of all footers: content, position, minimum and maximum of each column chunk."""

        def read(file: pa.NativeFile) -> bytes:
            size = file.size()
            length = int.from_bytes(file.read_at(4, size - 8), "little")
            return hashlib.blake2b(file.read_at(length, size - 8 - length), digest_size=16).digest()

        digests = self._of_each(lambda path: self._read(path, read))
        return hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()

    def _read(self, path: str, read: Callable, *, what: str = "") -> T:
        """``read`` of the open file, retried if storage fails. Raises RequestError if the file is damaged."""

        def attempt() -> T:
            try:
                with self.filesystem.open_input_file(path) as file:
                    return read(file)
            except (MemoryError, RequestError):
                raise
            except Exception as e:
                noting = _NotingFile(self.filesystem, path)
                try:
                    return read(pa.PythonFile(noting, mode="r"))
                except Exception as again:
                    if noting.failure is not None:
                        raise noting.failure from e
                    raise RequestError(
                        f"manifest {path}{what}: expected a Parquet file: {one_line(again, limit=200)}; make it again"
                    ) from again

        return with_retries(path, attempt)


def _local_version(path: str) -> tuple:
    status = os.stat(path)
    # ctime cannot be set back, mtime can.
    return status.st_dev, status.st_ino, status.st_ctime_ns


def _version(info: dict) -> list[tuple[str, str]]:
    return sorted((name, str(value)) for name, value in info.items() if _VERSION.search(name) and value)


class _NotingFile(io.RawIOBase):
    """A file of a file system that notes the first failure of the storage."""

    def __init__(self, filesystem: pyarrow.fs.FileSystem, path: str):
        self.failure: Exception | None = None
        self._file = self._noted(lambda: filesystem.open_input_file(path))
        self._size = self._noted(self._file.size)

    def _noted(self, step: Callable[[], T]) -> T:
        try:
            return step()
        except Exception as e:
            self.failure = self.failure or e
            raise

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._noted(lambda: self._file.seek(offset, whence))

    def tell(self) -> int:
        return self._file.tell()

    def size(self) -> int:
        return self._size

    def read(self, size: int = -1) -> bytes:
        return self._noted(lambda: self._file.read(None if size < 0 else size))
