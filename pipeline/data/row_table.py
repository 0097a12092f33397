"""Rows by number at the cost of a memory access: Arrow record batches, in memory or mapped from a local copy.

A manifest is read in random order, but reaching one row of a Parquet file means decoding its whole row group. So each
machine copies the rows once into a file below ``files.cache_dir``, which all its processes map. Small manifests are
copied into memory, the largest are read in place, as large ones are on machines that only decode. The fingerprint of
the rows is computed while copying.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from pipeline.credentials import redacted
from pipeline.data.columns import Fingerprint, normalise, type_of, usable
from pipeline.data.file_index import FileIndex
from pipeline.data.order import MANY_ROWS
from pipeline.data.parquet_files import ParquetFiles
from pipeline.data.row_groups import FINGERPRINT, RowGroups, copy_path, equal_batches, spread
from pipeline.data.row_index import RowIndex
from pipeline.errors import RequestError, one_line
from pipeline.files import TEMPORARY_SUFFIX, whole_file, write_bytes, write_json
from pipeline.waiting import waiting_for

_ROWS_PER_BATCH = 4096
# Maximum rows and bytes of a manifest that each process holds in its own memory.
_IN_MEMORY_ROWS = 16_384
_IN_MEMORY_BYTES = 4 << 20
# Maximum record batches that stay open.
_KEPT_BATCHES = 1024
# Maximum rows of a copy.
_MAX_COPIED_ROWS = MANY_ROWS
# Number of rows above which machines that only decode read in place rather than copy: seconds, and minutes from a
# bucket. The largest row group for which they do: a millisecond to decode.
_READ_IN_PLACE_ROWS, _READ_IN_PLACE_GROUP = 5_000_000, 4096
# Approximate bytes of a copy for each byte of Parquet.
_GROWTH = 5
# Batches between two looks at whether the disk has room for the rest of a copy.
_BATCHES_PER_LOOK = 64
# Maximum copies in the cache; the least recently used are removed.
_KEPT_COPIES = 64
# Seconds without a write after which an unfinished copy is considered abandoned.
_ABANDONED_S = 3600.0
# Suffix of the file with the index of a manifest that is read in place.
_INDEX = ".index"


class RowTable:
    """Rows by number. fingerprint: a ``Fingerprint.digests``."""

    def __init__(self, source: pa.Buffer | pa.NativeFile, fingerprint: dict):
        self._reader = pa.ipc.open_file(source)
        self.fingerprint = fingerprint
        self.num_rows = fingerprint["num_rows"]
        self._batch = functools.lru_cache(maxsize=_KEPT_BATCHES)(self._reader.get_batch)

    def row(self, index: int) -> pa.RecordBatch:
        """A record batch of one row."""
        number, within = divmod(index, _ROWS_PER_BATCH)
        return self._batch(number).slice(within, 1)

    def batches(self, columns: Iterable[str], *, max_rows: int | None = None) -> Iterator[pa.RecordBatch]:
        """Some columns of all rows in order. max_rows: only evenly spread pieces with about this number of rows."""
        names, max_rows = list(columns), self.num_rows if max_rows is None else max_rows
        numbers = spread(self._reader.num_record_batches, -(-max_rows // _ROWS_PER_BATCH))
        return (self._reader.get_batch(number).select(names) for number in numbers)

    def has_null_ids(self) -> bool:
        return any(batch.column("id").null_count for batch in self.batches(["id"]))


class Rows:
    """The rows of a manifest, wherever they are: opened when they are asked for.

    columns: that are needed of rows read in place, all by default. known: as the run began with them; the manifest's
    files are then neither listed nor opened before they are read.
    """

    def __init__(self, uri: str, media: tuple[str, ...], *, columns: Iterable[str] | None, known: RowIndex | None):
        self._uri, self._media, self._known = uri, media, known
        # Before the files are looked at.
        self._began_ns = known.began_ns if known else time.time_ns()
        self._columns = None if columns is None else tuple(columns)

    @functools.cached_property
    def files(self) -> ParquetFiles:
        """The manifest's files."""
        known = FileIndex.from_bytes(self._known.files) if self._known and self._known.files else None
        return ParquetFiles(self._uri, self._media, known=known, began_ns=self._began_ns if self._known else None)

    @functools.cached_property
    def stamp(self) -> str:
        """The name of the copy: of the files as the first machine of the run saw them."""
        return self._known.stamp if self._known else self.files.stamp()

    @functools.cached_property
    def num_rows(self) -> int:
        """The number of rows. Opens no file if this machine has seen the manifest before."""
        if self._known:
            return self._known.fingerprint["num_rows"]
        return (self._existing or self.files).num_rows

    @functools.cached_property
    def opened(self) -> RowTable | RowGroups:
        """The rows, copied first if necessary.

        Manifests too large to copy are read in place. Raises RequestError if their row groups are too large for that,
        or if the copy does not fit on the disk.
        """
        return self._existing or self._open()

    @property
    def index(self) -> RowIndex | None:
        """The rows for other processes; None for a small manifest, which each of them reads itself."""
        rows = self.opened
        if self._in_memory():
            return None
        copied = isinstance(rows, RowTable)
        files = self._files_in_place() if not copied or self.num_rows > _READ_IN_PLACE_ROWS else b""
        return RowIndex(self.stamp, rows.fingerprint, self.folder, files, copied, self._began_ns)

    def _files_in_place(self) -> bytes:
        """The index for machines that read in place; empty if the row groups are too large for those that decode."""
        index = self.files.index
        if self.num_rows <= _MAX_COPIED_ROWS and index.largest_group() > _READ_IN_PLACE_GROUP:
            return b""
        path = copy_path(self.stamp).with_suffix(_INDEX)
        # If the disk is full, the footers are read again next time.
        with contextlib.suppress(OSError):
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(path, index.to_bytes())
                _prune(path.parent)
        return index.to_bytes()

    def copy(self) -> None:
        """Makes the copy if this machine lacks it."""
        if _open_copy(copy_path(self.stamp), self._known) is None:
            self._open()

    @functools.cached_property
    def folder(self) -> str:
        """The folder at which relative paths start."""
        return self._known.folder if self._known else self.files.folder

    @functools.cached_property
    def _existing(self) -> RowTable | RowGroups | None:
        """The rows if this machine has copied or indexed them already; opens none of the manifest's files."""
        path = copy_path(self.stamp)
        if self._known is None:
            with contextlib.suppress(OSError, ValueError):
                self.files.index = FileIndex.from_bytes(path.with_suffix(_INDEX).read_bytes())
                path.with_suffix(_INDEX).touch()
                if self.files.num_rows > _MAX_COPIED_ROWS:
                    return RowGroups(self.files, columns=self._columns)
        copy = None if self._known and not self._known.copied else _open_copy(path, self._known)
        if copy is None and self._known and self._known.files:
            return RowGroups(self.files, columns=self._columns, known=self._known)
        return copy

    def _in_memory(self) -> bool:
        return self.num_rows <= _IN_MEMORY_ROWS and self._known is None and self.files.num_bytes <= _IN_MEMORY_BYTES

    def _open(self) -> RowTable | RowGroups:
        files, path = self.files, copy_path(self.stamp)
        if self._in_memory():
            sink = pa.BufferOutputStream()
            fingerprint = _copy(files, sink, num_rows=self.num_rows, folder=None)
            return RowTable(sink.getvalue(), fingerprint)
        # Decided by rows only, so that every machine computes the same kind of fingerprint.
        if self.num_rows > _MAX_COPIED_ROWS:
            rows = RowGroups(files, columns=self._columns)
            self._files_in_place()
            return rows
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                return _open_copy(path, self._known) or _write_copy(files, path, self._known, num_rows=self.num_rows)
        except OSError as e:
            raise RequestError(
                f"manifest {files.uri}: a copy of its rows cannot be written to {path.parent}: {one_line(e)}; free "
                "some space, or set IMP_CACHE to another folder"
            ) from e


def _write_copy(files: ParquetFiles, path: Path, known: RowIndex | None, *, num_rows: int) -> RowTable:
    _remove_leftovers(path)
    _prune(path.parent, needed=_GROWTH * files.num_bytes)
    with whole_file(path, durable=False) as whole:
        with pa.OSFile(str(whole), "wb") as sink:
            fingerprint = _copy(files, sink, num_rows=num_rows, folder=path.parent)
        path.with_suffix(".json").unlink(missing_ok=True)
        # A copy of rows other than the run's is not left for the next run to find under their name.
        if known is None or fingerprint == known.fingerprint:
            write_json(path.with_suffix(".json"), {"bytes": whole.stat().st_size, "fingerprint": fingerprint})
    _prune(path.parent)
    return RowTable(pa.memory_map(str(path)), fingerprint)


def _open_copy(path: Path, known: RowIndex | None) -> RowTable | None:
    """An intact copy of the rows that are known; None if there is none."""
    try:
        described = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if path.stat().st_size != described["bytes"]:
            return None
        if known and described["fingerprint"] != known.fingerprint:
            return None
        path.touch()
        return RowTable(pa.memory_map(str(path)), described["fingerprint"])
    except (OSError, ValueError, KeyError, pa.ArrowInvalid):
        return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lets one process of the machine copy while the others wait."""
    with open(path, "w") as lock:
        with waiting_for("another process that copies the rows of a manifest"):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _copy(files: ParquetFiles, sink: pa.NativeFile, *, num_rows: int, folder: Path | None) -> dict:
    """Writes all rows in batches of equal size. Returns their fingerprint. folder: whose disk must have room."""
    columns, fingerprint = usable(files.schema, files.media), Fingerprint()
    schema = pa.schema([(name, type_of(name)) for name in columns])

    def progress() -> str:
        return f"a copy of {redacted(files.uri)}: {fingerprint.num_rows:,} of {num_rows:,} rows"

    quiet = num_rows <= _IN_MEMORY_ROWS
    with waiting_for(progress, quiet=quiet), pa.ipc.new_file(sink, schema) as writer:
        pieces = (normalise(p, columns) for p in files.pieces(columns))
        for number, batch in enumerate(equal_batches(pieces, _ROWS_PER_BATCH), 1):
            fingerprint.update(batch)
            writer.write_batch(batch)
            if folder and number % _BATCHES_PER_LOOK == 0:
                _check_room(folder, sink.tell(), done=fingerprint.num_rows / num_rows)
    return fingerprint.digests()


def _check_room(folder: Path, written: int, *, done: float) -> None:
    """Raises OSError if the rest of a file will not fit. done: the share of it that is written."""
    needed, free = written / done - written, shutil.disk_usage(folder).free
    if needed > free:
        whole, room = (written + needed) / 1e9, (written + free) / 1e9
        raise OSError(errno.ENOSPC, f"about {whole:.1f} GB needed, {room:.1f} GB free")


def _remove_leftovers(path: Path) -> None:
    """Removes leftovers of killed writers: of this copy, whose lock is held, and old ones of others."""
    for left in path.parent.glob(f".*{TEMPORARY_SUFFIX}"):
        if left.name.startswith(f".{path.name}.") or time.time() - _used_at(left) > _ABANDONED_S:
            left.unlink(missing_ok=True)


def _prune(folder: Path, *, needed: int = 0) -> None:
    """Removes the least recently used copies and indexes, and more of them while ``needed`` bytes are not free.

    Processes that have one open keep it until they end.
    """
    used: dict[Path, float] = {}
    for suffix in (".arrow", _INDEX):
        for path in folder.glob(f"*{suffix}"):
            name = path.with_suffix("")
            used[name] = max(used.get(name, 0.0), _used_at(path))
    kept = sorted(used, key=lambda name: used[name], reverse=True)
    while len(kept) > _KEPT_COPIES or (kept and shutil.disk_usage(folder).free < needed):
        name = kept.pop()
        for suffix in (".arrow", ".json", ".lock", _INDEX, FINGERPRINT):
            name.with_suffix(suffix).unlink(missing_ok=True)


def _used_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # removed by another process
        return 0.0
