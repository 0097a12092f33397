"""The Parquet files of a manifest: listed, their footers read when asked for, their rows streamed in bounded pieces.

Tells damage from unreachable storage: if reading a file fails, it is read again through a file object that notes every
failure of the storage. Without such a failure the file is damaged, and retrying is useless.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
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
from pipeline.data.media.storage import file_info, resolve_filesystem, with_retries
from pipeline.data.noting_file import NotingFile
from pipeline.errors import DataError, RequestError, one_line
from pipeline.ray_job import upload_hint
from pipeline.waiting import waiting_for

# Maximum rows of a piece of a stream, and its bytes before they are decoded.
_ROWS_PER_PIECE, _PIECE_BYTES = 16_384, 32 << 20
# Bytes that are read ahead of each column of a row group that is streamed.
_BUFFER_BYTES = 4 << 20
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

    media: columns of added modalities. known: the files as the run began with them, at ``began_ns``; nothing is listed
    then, and a file is compared with it whenever it is read. Raises RequestError if nothing is found or a file is not
    valid Parquet, DataError if storage stays unreachable.
    """

    def __init__(
        self, uri: str, media: tuple[str, ...] = (), *, known: FileIndex | None = None, began_ns: int | None = None
    ):
        self.uri = uri
        self.media = media
        self._known = known
        self._began_ns = began_ns
        self.filesystem, self._path = with_retries(uri, lambda: resolve_filesystem(uri))
        self.paths = known.paths if known else [info.path for info in self.infos]
        self.folder = str(PurePosixPath(self._path).parent) if self.paths == [self._path] else self._path
        self._numbers = {path: number for number, path in enumerate(known.paths)} if known else {}
        self._footers: collections.OrderedDict[str, tuple[pq.FileMetaData, pa.Schema]] = collections.OrderedDict()
        self._footer_bytes = 0
        self._types = functools.lru_cache(maxsize=_KEPT_FOOTERS)(self._file_types)

    @functools.cached_property
    def infos(self) -> list[pyarrow.fs.FileInfo]:
        """The files as the file system lists them."""
        return with_retries(self.uri, lambda: self._list(self._path))

    def _list(self, path: str) -> list[pyarrow.fs.FileInfo]:
        try:
            info = file_info(self.filesystem, path)
        except pa.ArrowInvalid as e:
            raise RequestError(f"manifest {self.uri}: {e}") from e
        if info.type == pyarrow.fs.FileType.File:
            return [info]
        if info.type == pyarrow.fs.FileType.Directory:
            selector = pyarrow.fs.FileSelector(path, recursive=False)
            files = [i for i in self.filesystem.get_file_info(selector) if i.path.endswith(".parquet")]
            if files:
                return sorted(files, key=lambda i: i.path)
        if self._began_ns is not None:
            raise _absent(self.uri)
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
        done, times = 0, {info.path: info.mtime_ns for info in self.infos}

        def summary(path: str) -> FileSummary:
            nonlocal done
            size, tail = self._read(path, lambda file: (file.size(), _tail(file)))
            footer, schema = self._parsed(path, tail)
            self._keep(path, footer, schema)
            done += 1
            groups = [footer.row_group(n).num_rows for n in range(footer.num_row_groups)]
            return FileSummary(size, _digest(tail), np.array(groups, np.int64), times[path])

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
        return sum(self._known.bytes) if self._known else sum(info.size or 0 for info in self.infos)

    @property
    def schema(self) -> pa.Schema:
        """The schema of the first file."""
        return pa.schema(list(self._types(self.paths[0]).items()))

    def footer(self, path: str) -> pq.FileMetaData:
        """A file's footer. Raises RequestError if it is not the one that the run began with."""
        return self._at_hand(path)[0]

    def columns(self, path: str) -> pa.Schema:
        """All columns of a file. Raises RequestError as ``footer`` does."""
        return self._at_hand(path)[1]

    def _at_hand(self, path: str) -> tuple[pq.FileMetaData, pa.Schema]:
        found = self._footers.get(path)
        if found is None:
            tail = self._read(path, _tail)
            if path in self._numbers and _digest(tail) != self._known.footers[self._numbers[path]]:
                raise _exchanged(path)
            found = self._parsed(path, tail)
        self._keep(path, *found)
        return found

    def _parsed(self, path: str, tail: bytes) -> tuple[pq.FileMetaData, pa.Schema]:
        try:
            file = pq.ParquetFile(pa.BufferReader(tail))
            # Not the footer's own ``schema``: the two hold each other, and would stay until the garbage is collected.
            return file.metadata, file.schema_arrow
        except (pa.ArrowException, OSError) as e:
            raise _not_parquet(path, e) from e

    def _keep(self, path: str, footer: pq.FileMetaData, schema: pa.Schema) -> None:
        """Keeps a footer at hand in place of those used least recently."""
        with _LOCK:
            if path not in self._footers:
                self._footers[path] = footer, schema
                self._footer_bytes += footer.serialized_size
            self._footers.move_to_end(path)
            while len(self._footers) > (_KEPT_FOOTERS if self._footer_bytes <= _KEPT_FOOTER_BYTES else 1):
                self._footer_bytes -= self._footers.popitem(last=False)[1][0].serialized_size

    def identity(self, path: str) -> str:
        """A digest of a file's name, size, time and footer."""
        size, tail = self._read(path, lambda file: (file.size(), _tail(file)))
        time = self.filesystem.get_file_info(path).mtime_ns
        return hashlib.blake2b(repr([path, size, time, _digest(tail)]).encode(), digest_size=16).hexdigest()

    def pieces(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """The rows of all files in order, in bounded pieces."""
        for path in self.paths:
            yield from self.file_pieces(path, columns)

    def file_pieces(self, path: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """The rows of one file in order, in bounded pieces, of the columns that it has."""
        here = self._here(path, columns)
        for number in range(self.footer(path).num_row_groups):
            rows = self._rows_per_piece(path, number, here)
            if self.footer(path).row_group(number).num_rows <= rows:
                yield from self.group(path, number, columns).to_batches(rows)
            else:
                yield from self._streamed(path, number, here, rows=rows)

    def _rows_per_piece(self, path: str, number: int, columns: list[str]) -> int:
        group = self.footer(path).row_group(number)
        chunks = (group.column(n) for n in range(group.num_columns))
        size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.partition(".")[0] in columns)
        return max(1, min(_ROWS_PER_PIECE, _PIECE_BYTES * group.num_rows // max(1, size)))

    def _streamed(self, path: str, number: int, columns: list[str], *, rows: int) -> Iterator[pa.RecordBatch]:
        """A row group that is decoded piece by piece. After a failure of storage its beginning is passed over."""
        done, pieces = 0, None

        def read(file: pa.NativeFile) -> Iterator[pa.RecordBatch]:
            # Other options than for a whole group: pages are read as they are needed.
            options = {"pre_buffer": False, "buffer_size": _BUFFER_BYTES, "page_checksum_verification": True}
            parquet = pq.ParquetFile(file, metadata=self.footer(path), **options)
            return itertools.islice(parquet.iter_batches(rows, row_groups=[number], columns=columns), done, None)

        def advance() -> pa.RecordBatch | None:
            nonlocal pieces
            with self._explained(path, lambda file: next(read(file), None), what=f", row group {number}"):
                pieces = read(self._opened(path)) if pieces is None else pieces
                try:
                    return next(pieces, None)
                except Exception:
                    pieces = None
                    raise

        while (piece := self._retried(path, advance)) is not None:
            done += 1
            yield piece

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
        schema = self.columns(path)
        for name in (*TYPES, *self.media):
            count = schema.names.count(name)
            if count > 1:
                raise RequestError(f"manifest {path}: column {name!r} appears {count} times; keep one of them")
        return {field.name: field.type for field in schema}

    def _read(self, path: str, read: Callable[[pa.NativeFile], T], *, what: str = "") -> T:
        """``read`` of the open file, retried if storage fails. Raises RequestError if the file is damaged."""

        def attempt() -> T:
            with self._explained(path, read, what=what), self._opened(path) as file:
                found = read(file)
                # Afterwards, so that an exchange while it is read is found too.
                self._compare(path, file)
                return found

        return self._retried(path, attempt)

    def _opened(self, path: str) -> pa.NativeFile:
        """An open file, the one that the run began with."""
        file = self.filesystem.open_input_file(path)
        self._compare(path, file)
        return file

    def _compare(self, path: str, file: pa.NativeFile) -> None:
        """Raises RequestError if a file has another size than when the run began, or was changed since.

        A copy that a machine got before may have another time.
        """
        number = self._numbers.get(path)
        if number is None:
            return
        if file.size() != self._known.bytes[number]:
            raise _exchanged(path)
        then = self._known.modified[number]
        if then is None or self._began_ns is None:
            return
        now = self._modified_ns(path, file)
        if now is not None and now != then and now > self._began_ns:
            raise _exchanged(path)

    def _modified_ns(self, path: str, file: pa.NativeFile) -> int | None:
        """The time of an open file; of an object in S3 as opening it has told, without one more request."""
        if isinstance(self.filesystem, pyarrow.fs.S3FileSystem) and (told := file.metadata().get(b"Last-Modified")):
            return int(datetime.fromisoformat(told.decode()).timestamp()) * 10**9
        return self.filesystem.get_file_info(path).mtime_ns

    @contextlib.contextmanager
    def _explained(self, path: str, read: Callable[[pa.NativeFile], object], *, what: str) -> Iterator[None]:
        """Raises what the storage has raised, and RequestError for a damaged file. read: what the block does."""
        try:
            yield
        except (MemoryError, RequestError):
            raise
        except Exception as e:
            noting = NotingFile(self.filesystem, path)
            try:
                read(pa.PythonFile(noting, mode="r"))
            except Exception as again:
                if noting.failure is not None:
                    raise noting.failure from e
                raise _not_parquet(path + what, again) from again
            # It was the storage: it can be read now.
            raise

    def _retried(self, path: str, attempt: Callable[[], T]) -> T:
        try:
            return with_retries(path, attempt)
        except DataError as e:
            if path in self._numbers and _is_absent(self.filesystem, path):
                raise _absent(path) from e
            raise


def _is_absent(filesystem: pyarrow.fs.FileSystem, path: str) -> bool:
    with contextlib.suppress(Exception):
        return filesystem.get_file_info(path).type == pyarrow.fs.FileType.NotFound
    return False


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


def _absent(path: str) -> DataError:
    return DataError(
        f"manifest {path}: not found on {socket.gethostname()}, although the run began with it; every machine needs "
        "the manifest under the same path (a shared mount, or a bucket)"
    )


def _local_version(path: str) -> tuple:
    status = os.stat(path)
    # ctime cannot be set back, mtime can.
    return status.st_dev, status.st_ino, status.st_ctime_ns


def _version(info: dict) -> list[tuple[str, str]]:
    return sorted((name, str(value)) for name, value in info.items() if _VERSION.search(name) and value)
