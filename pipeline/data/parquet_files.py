"""The Parquet files of a manifest: listed, their footers read when asked for, their rows streamed in bounded pieces.

Tells damage from unreachable storage: if reading a file fails, it is read again through a file object that notes every
failure of the storage. Without such a failure the file is damaged, and retrying is useless.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import hashlib
import io
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from pipeline.commands import command
from pipeline.credentials import redacted
from pipeline.data.columns import TYPES, type_fault
from pipeline.data.file_index import FileIndex, FileSummary
from pipeline.data.media.storage import resolve_filesystem, with_retries
from pipeline.errors import RequestError, one_line
from pipeline.ray_job import upload_hint
from pipeline.waiting import waiting_for

# Rows of a piece of a stream.
_ROWS_PER_PIECE = 16_384
# Maximum footers in memory, and their bytes as they lie in the files; parsed, they take twenty times as much.
_KEPT_FOOTERS, _KEPT_FOOTER_BYTES = 64, 2 << 20
# Bytes at the end of a file that are read first: most footers are shorter.
_TAIL_BYTES = 64 << 10
_LISTING_THREADS = 16
# Names under which file systems of fsspec give a file's time, checksum or version.
_VERSION = re.compile(r"etag|md5|sha|digest|checksum|crc|modified|created|updated|mtime|version|blob_id", re.IGNORECASE)
# Held while the footers at hand change: several threads read them.
_LOCK = threading.Lock()
T = TypeVar("T")


class ParquetFiles:
    """One Parquet file, or all ``*.parquet`` files of a folder, sorted by name.

    media: columns of added modalities. known: the files as the run began with them; nothing is listed then, and a file
    is compared with it when it is opened. Raises RequestError if nothing is found or a file is not valid Parquet,
    DataError if storage stays unreachable.
    """

    def __init__(self, uri: str, media: tuple[str, ...] = (), *, known: FileIndex | None = None):
        self.uri = uri
        self.media = media
        self._known = known
        self.filesystem, self._path = with_retries(uri, lambda: resolve_filesystem(uri))
        self.paths = known.paths if known else [info.path for info in self.infos]
        self.folder = str(PurePosixPath(self._path).parent) if self.paths == [self._path] else self._path
        self._numbers = {path: number for number, path in enumerate(known.paths)} if known else {}
        self._footers: collections.OrderedDict[str, pq.FileMetaData] = collections.OrderedDict()
        self._footer_bytes = 0
        self._types = functools.lru_cache(maxsize=_KEPT_FOOTERS)(self._file_types)

    @functools.cached_property
    def infos(self) -> list[pyarrow.fs.FileInfo]:
        """The files as the file system lists them."""
        return with_retries(self.uri, lambda: self._list(self._path))

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
        return [self.index.footers_digest()] * len(self.infos)

    @functools.cached_property
    def index(self) -> FileIndex:
        """The row groups of all files. Opens each of them, unless they are known."""
        if self._known is not None:
            return self._known
        done = 0

        def summary(path: str) -> FileSummary:
            nonlocal done
            size, tail = self._read(path, lambda file: (file.size(), _tail(file)))
            footer = self._parsed(path, tail)
            self._keep(path, footer)
            done += 1
            groups = [footer.row_group(n).num_rows for n in range(footer.num_row_groups)]
            return FileSummary(size, _digest(tail), np.array(groups, np.int64))

        def progress() -> str:
            return f"the footers of {redacted(self.uri)}: {done:,} of {len(self.paths):,} files"

        with waiting_for(progress, quiet=len(self.paths) <= _LISTING_THREADS):
            return FileIndex.of(self.paths, self._of_each(summary))

    def _of_each(self, look: Callable[[str], T]) -> list[T]:
        """``look`` of each file; several at a time, to hide the latency of storage."""
        with concurrent.futures.ThreadPoolExecutor(_LISTING_THREADS) as threads:
            return list(threads.map(look, self.paths))

    @property
    def num_rows(self) -> int:
        return self.index.num_rows

    @property
    def num_bytes(self) -> int:
        return sum(info.size or 0 for info in self.infos)

    @property
    def schema(self) -> pa.Schema:
        """The schema of the first file."""
        return pa.schema(list(self._types(self.paths[0]).items()))

    def footer(self, path: str) -> pq.FileMetaData:
        """A file's footer. Raises RequestError if it is not the one that the run began with."""
        footer = self._footers.get(path)
        if footer is None:
            tail = self._read(path, _tail)
            if path in self._numbers and _digest(tail) != self._known.footers[self._numbers[path]]:
                raise _exchanged(path)
            footer = self._parsed(path, tail)
        self._keep(path, footer)
        return footer

    def _parsed(self, path: str, tail: bytes) -> pq.FileMetaData:
        try:
            return pq.read_metadata(pa.BufferReader(tail))
        except (pa.ArrowException, OSError) as e:
            raise _not_parquet(path, e) from e

    def _keep(self, path: str, footer: pq.FileMetaData) -> None:
        """Keeps a footer at hand in place of those used least recently."""
        with _LOCK:
            if path not in self._footers:
                self._footers[path] = footer
                self._footer_bytes += footer.serialized_size
            self._footers.move_to_end(path)
            while len(self._footers) > (_KEPT_FOOTERS if self._footer_bytes <= _KEPT_FOOTER_BYTES else 1):
                self._footer_bytes -= self._footers.popitem(last=False)[1].serialized_size

    def pieces(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """The rows of all files in order, one row group in memory at a time."""
        for path in self.paths:
            for number in range(self.footer(path).num_row_groups):
                yield from self.group(path, number, columns).to_batches(_ROWS_PER_PIECE)

    def group(self, path: str, number: int, columns: list[str]) -> pa.Table:
        """One row group, of the columns that the file has."""
        footer, here = self.footer(path), self._here(path, columns)

        def read(file: pa.NativeFile) -> pa.Table:
            # Few large requests to storage; a local file is read chunk by chunk.
            remote = not isinstance(self.filesystem, pyarrow.fs.LocalFileSystem)
            parquet = pq.ParquetFile(file, metadata=footer, page_checksum_verification=True, pre_buffer=remote)
            return parquet.read_row_group(number, here)

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

    def _read(self, path: str, read: Callable, *, what: str = "") -> T:
        """``read`` of the open file, retried if storage fails. Raises RequestError if the file is damaged."""

        def attempt() -> T:
            try:
                with self.filesystem.open_input_file(path) as file:
                    if path in self._numbers and file.size() != self._known.bytes[self._numbers[path]]:
                        raise _exchanged(path)
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
                    raise _not_parquet(path + what, again) from again

        return with_retries(path, attempt)


def _tail(file: pa.NativeFile) -> bytes:
    """The end of a Parquet file: footer, its length, and the mark."""
    size = file.size()
    tail = file.read_at(min(size, _TAIL_BYTES), max(0, size - _TAIL_BYTES))
    length = int.from_bytes(tail[-8:-4], "little") + 8
    return tail[-length:] if length <= len(tail) else file.read_at(min(size, length), max(0, size - length))


def _digest(tail: bytes) -> bytes:
    """A digest of a footer: content, position, minimum and maximum of each column chunk."""
    return hashlib.blake2b(tail[:-8], digest_size=16).digest()


def _not_parquet(what: str, error: Exception) -> RequestError:
    return RequestError(f"manifest {what}: expected a Parquet file: {one_line(error, limit=200)}; make it again")


def _exchanged(path: str) -> RequestError:
    return RequestError(
        f"manifest {path}: the file is not the one that the run began with; all machines must see the same manifest, "
        "unchanged until the run ends"
    )


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
