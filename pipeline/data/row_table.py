"""Rows by number at the cost of a memory access: Arrow record batches, in memory or mapped from a local copy.

A manifest is read in random order, but reaching one row of a Parquet file means decoding its whole row group. So each
machine copies the rows once into a file below ``files.cache_dir``, which all its processes map. Small manifests are
copied into memory, the largest are read in place. The fingerprint of the rows is computed while copying.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from pipeline.data.columns import Fingerprint, normalise, type_of, usable
from pipeline.data.parquet_files import ParquetFiles
from pipeline.data.row_groups import RowGroups, copy_path, made_once, one_batch, spread
from pipeline.errors import RequestError, one_line
from pipeline.files import TEMPORARY_SUFFIX, whole_file, write_json

_ROWS_PER_BATCH = 4096
# Maximum rows and bytes of a manifest that each process holds in its own memory.
_IN_MEMORY_ROWS = 16_384
_IN_MEMORY_BYTES = 4 << 20
# Maximum record batches that stay open.
_KEPT_BATCHES = 1024
# Maximum rows of a copy.
_MAX_COPIED_ROWS = 200_000_000
# Approximate bytes of a copy for each byte of Parquet.
_GROWTH = 5
# Maximum copies in the cache; the least recently used are removed.
_KEPT_COPIES = 64
# Seconds without a write after which an unfinished copy is considered abandoned.
_ABANDONED_S = 3600.0
# Suffix of the file with the sizes of a manifest that is read in place (``ParquetFiles.sizes``).
_SIZES = ".sizes.json"


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


def existing_rows(files: ParquetFiles) -> RowTable | RowGroups | None:
    """The rows of a manifest that this machine has already copied or measured; opens none of its files."""
    path = copy_path(files)
    with contextlib.suppress(OSError, ValueError):
        files.sizes = json.loads(path.with_suffix(_SIZES).read_bytes())
        return RowGroups(files)
    return _open_copy(path)


def open_rows(files: ParquetFiles) -> RowTable | RowGroups:
    """The rows of a manifest, copied first if necessary.

    Manifests too large to copy are read in place. Raises RequestError if their row groups are too large for that, or if
    the copy does not fit on the disk.
    """
    if files.num_rows <= _IN_MEMORY_ROWS and files.num_bytes <= _IN_MEMORY_BYTES:
        sink = pa.BufferOutputStream()
        fingerprint = _copy(files, sink)
        return RowTable(sink.getvalue(), fingerprint)
    # Decided by rows only, so that every machine computes the same kind of fingerprint.
    path = copy_path(files)
    if files.num_rows > _MAX_COPIED_ROWS:
        rows = RowGroups(files)
        made_once(path.with_suffix(_SIZES), lambda: files.sizes)
        return rows
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            return _open_copy(path) or _write_copy(files, path)
    except OSError as e:
        raise RequestError(
            f"manifest {files.uri}: a copy of its rows, about {_GROWTH * files.num_bytes / 1e9:.1f} GB, cannot be "
            f"written to {path.parent}: {one_line(e)}; free some space, or set IMP_CACHE to another folder"
        ) from e


def _write_copy(files: ParquetFiles, path: Path) -> RowTable:
    _remove_leftovers(path)
    with whole_file(path, durable=False) as whole:
        with pa.OSFile(str(whole), "wb") as sink:
            fingerprint = _copy(files, sink)
        write_json(path.with_suffix(".json"), {"bytes": whole.stat().st_size, "fingerprint": fingerprint})
    _prune(path.parent)
    return RowTable(pa.memory_map(str(path)), fingerprint)


def _open_copy(path: Path) -> RowTable | None:
    """An intact copy; None if there is none."""
    try:
        described = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if path.stat().st_size != described["bytes"]:
            return None
        path.touch()
        return RowTable(pa.memory_map(str(path)), described["fingerprint"])
    except (OSError, ValueError, KeyError, pa.ArrowInvalid):
        return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lets one process of the machine copy while the others wait."""
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _copy(files: ParquetFiles, sink: pa.NativeFile) -> dict:
    """Writes all rows in batches of equal size. Returns their fingerprint."""
    columns, fingerprint = usable(files.schema, files.media), Fingerprint()
    schema = pa.schema([(name, type_of(name)) for name in columns])
    with pa.ipc.new_file(sink, schema) as writer:
        for batch in _equal_batches(normalise(p, columns) for p in files.pieces(columns)):
            fingerprint.update(batch)
            writer.write_batch(batch)
    return fingerprint.digests()


def _equal_batches(pieces: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of ``_ROWS_PER_BATCH``, the last one shorter."""
    held, rows = [], 0
    for piece in pieces:
        held.append(piece)
        rows += len(piece)
        if rows < _ROWS_PER_BATCH:
            continue
        table, start = pa.Table.from_batches(held), 0
        while rows - start >= _ROWS_PER_BATCH:
            yield one_batch(table.slice(start, _ROWS_PER_BATCH))
            start += _ROWS_PER_BATCH
        held, rows = table.slice(start).to_batches(), rows - start
    if rows:
        yield one_batch(pa.Table.from_batches(held))


def _remove_leftovers(path: Path) -> None:
    """Removes leftovers of killed writers: of this copy, whose lock is held, and old ones of others."""
    for left in path.parent.glob(f".*{TEMPORARY_SUFFIX}"):
        if left.name.startswith(f".{path.name}.") or time.time() - _used_at(left) > _ABANDONED_S:
            left.unlink(missing_ok=True)


def _prune(folder: Path) -> None:
    """Removes the least recently used copies. Processes that have one open keep it until they end."""
    for path in sorted(folder.glob("*.arrow"), key=_used_at, reverse=True)[_KEPT_COPIES:]:
        for suffix in (".arrow", ".json", ".lock"):
            path.with_suffix(suffix).unlink(missing_ok=True)


def _used_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # removed by another process
        return 0.0
