"""Rows by number, at the cost of a look into memory: Arrow record batches, in memory or mapped from a local copy.

A manifest is read in random order, and Parquet is not made for that: to reach one row its whole row group is decoded.
So its rows are copied once a machine into a file below ``files.cache_dir``, which all its processes map. Small ones are
copied into memory, the largest read where they lie. The fingerprint of the rows is taken on the way.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.data.columns import Fingerprint, normalise, type_of, usable
from pipeline.data.parquet_files import ParquetFiles
from pipeline.errors import RequestError, one_line
from pipeline.files import TEMPORARY_SUFFIX, cache_dir, whole_file, write_json

_ROWS_PER_BATCH = 4096
# Maximum rows and bytes of the files whose rows each process holds for itself.
_IN_MEMORY_ROWS, _IN_MEMORY_BYTES = 16_384, 4 << 20
# Record batches that stay open.
_KEPT_BATCHES = 1024
# Maximum rows of a copy; bytes of it for each byte of Parquet, roughly.
_MOST_COPIED_ROWS, _GROWTH = 200_000_000, 5
# Copies that stay in the cache: those used last.
_KEPT_COPIES = 64
# Seconds without a write after which an unfinished copy has no writer any more.
_ABANDONED_S = 3600.0
# Beside the copies, of manifests that are read where they lie: their sizes (``ParquetFiles.sizes``) and fingerprints.
_SIZES, _FINGERPRINT = ".sizes.json", ".fingerprint.json"
# Of a manifest that is read where it lies: maximum rows of a row group, row groups in memory, files whose rows are
# fingerprinted, row groups for a look at some of its rows (each is a request to storage).
_MOST_ROWS_PER_GROUP, _KEPT_GROUPS, _SAMPLED_FILES, _MOST_GROUPS_LOOKED_AT = 65_536, 16, 64, 512


class RowTable:
    """Rows by number. fingerprint: as ``Fingerprint.digests`` gives it."""

    def __init__(self, source: pa.Buffer | pa.NativeFile, fingerprint: dict):
        self._reader = pa.ipc.open_file(source)
        self.fingerprint, self.num_rows = fingerprint, fingerprint["num_rows"]
        self._batch = functools.lru_cache(maxsize=_KEPT_BATCHES)(self._reader.get_batch)

    def row(self, index: int) -> pa.RecordBatch:
        """One row, as a record batch of one."""
        number, within = divmod(index, _ROWS_PER_BATCH)
        return self._batch(number).slice(within, 1)

    def batches(self, columns: Iterable[str], *, most_rows: int | None = None) -> Iterator[pa.RecordBatch]:
        """Some columns of all rows in order; most_rows: of pieces that hold as many, evenly spread."""
        names, most_rows = list(columns), self.num_rows if most_rows is None else most_rows
        numbers = _spread(self._reader.num_record_batches, -(-most_rows // _ROWS_PER_BATCH))
        return (self._reader.get_batch(number).select(names) for number in numbers)

    def has_null_ids(self) -> bool:
        return any(batch.column("id").null_count for batch in self.batches(["id"]))


def existing_rows(files: ParquetFiles) -> RowTable | RowGroups | None:
    """The rows of a manifest whose copy or whose sizes are on this machine: no file of it is opened."""
    path = _copy_path(files)
    with contextlib.suppress(OSError, ValueError):
        files.sizes = json.loads(path.with_suffix(_SIZES).read_bytes())
        return RowGroups(files)
    return _open_copy(path)


def open_rows(files: ParquetFiles) -> RowTable | RowGroups:
    """The rows of a manifest, copied where that was not done yet.

    Manifests too large for a copy are read where they lie. Raises RequestError where their row groups are too large
    for that, or where there is no room for the copy.
    """
    if files.num_rows <= _IN_MEMORY_ROWS and files.num_bytes <= _IN_MEMORY_BYTES:
        sink = pa.BufferOutputStream()
        fingerprint = _copy(files, sink)
        return RowTable(sink.getvalue(), fingerprint)
    # By rows alone, so that the fingerprint is of one kind on every machine.
    path = _copy_path(files)
    if files.num_rows > _MOST_COPIED_ROWS:
        rows = RowGroups(files)
        _made_once(path.with_suffix(_SIZES), lambda: files.sizes)
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


def _copy_path(files: ParquetFiles) -> Path:
    return cache_dir() / "manifests" / f"{files.stamp()}.arrow"


def _made_once(path: Path, make: Callable):
    """What ``make`` returns, or what it returned to an earlier process of this machine."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_bytes())
    value = make()
    # Without room for it, it is made again.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, value)
    return value


def _write_copy(files: ParquetFiles, path: Path) -> RowTable:
    _remove_leftovers(path)
    with whole_file(path, durable=False) as whole:
        with pa.OSFile(str(whole), "wb") as sink:
            fingerprint = _copy(files, sink)
        write_json(path.with_suffix(".json"), {"bytes": whole.stat().st_size, "fingerprint": fingerprint})
    _prune(path.parent)
    return RowTable(pa.memory_map(str(path)), fingerprint)


def _open_copy(path: Path) -> RowTable | None:
    """A copy that is whole; None where there is none."""
    try:
        described = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if path.stat().st_size != described["bytes"]:
            return None
        path.touch()
        return RowTable(pa.memory_map(str(path)), described["fingerprint"])
    except (OSError, ValueError, KeyError, pa.ArrowInvalid):
        return None


@contextlib.contextmanager
def _locked(path: Path):
    """One process of the machine copies, the others wait for it."""
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
            yield _one_batch(table.slice(start, _ROWS_PER_BATCH))
            start += _ROWS_PER_BATCH
        held, rows = table.slice(start).to_batches(), rows - start
    if rows:
        yield _one_batch(pa.Table.from_batches(held))


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    return table.combine_chunks().to_batches()[0]


def _remove_leftovers(path: Path) -> None:
    """Removes what writers that were killed have left: of this copy, whose lock is held, and old ones of others."""
    for left in path.parent.glob(f".*{TEMPORARY_SUFFIX}"):
        if left.name.startswith(f".{path.name}.") or time.time() - _used_at(left) > _ABANDONED_S:
            left.unlink(missing_ok=True)


def _prune(folder: Path) -> None:
    """Removes the copies that were used longest ago. Processes that have one open keep it until they end."""
    for path in sorted(folder.glob("*.arrow"), key=_used_at, reverse=True)[_KEPT_COPIES:]:
        for suffix in (".arrow", ".json", ".lock"):
            path.with_suffix(suffix).unlink(missing_ok=True)


def _spread(count: int, wanted: int) -> list[int]:
    """Numbers below ``count``, all of them or as many as are wanted, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(int)).tolist()


def _used_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process makes room too
        return 0.0


class RowGroups:
    """The rows of a manifest that is too large for a copy, each read with its row group from where it lies.

    The fingerprint is of all footers and of the rows of some row groups. Raises RequestError for large row groups.
    """

    def __init__(self, files: ParquetFiles):
        self._files, self._columns = files, usable(files.schema, files.media)
        self._starts = np.cumsum([0, *(rows for rows, _ in files.sizes)])
        self.num_rows = int(self._starts[-1])
        self._check_groups()
        self._group = functools.lru_cache(maxsize=_KEPT_GROUPS)(self._read_group)
        self._group_starts = functools.lru_cache(maxsize=_KEPT_GROUPS)(self._starts_of_groups)

    def _check_groups(self) -> None:
        rows, groups = max(self._files.sizes, key=lambda size: size[0] / max(1, size[1]))
        if rows > _MOST_ROWS_PER_GROUP * groups:
            raise RequestError(
                f"manifest {self._files.uri}: {self.num_rows} rows are too many for a copy, and reading them where "
                f"they lie takes row groups of at most {_MOST_ROWS_PER_GROUP} rows, found {rows // groups}; write the "
                "manifest with row_group_size=1024"
            )

    def row(self, index: int) -> pa.RecordBatch:
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        path, within = self._files.paths[file], index - int(self._starts[file])
        starts = self._group_starts(path)
        number = int(np.searchsorted(starts, within, side="right")) - 1
        return self._group(path, number).slice(within - int(starts[number]), 1)

    def _starts_of_groups(self, path: str) -> np.ndarray:
        footer = self._files.footer(path)
        return np.cumsum([0, *(footer.row_group(n).num_rows for n in range(footer.num_row_groups))])

    def _read_group(self, path: str, number: int, columns: list[str] | None = None) -> pa.RecordBatch:
        columns = columns or self._columns
        pieces = [normalise(p, columns) for p in self._files.group(path, number, columns).to_batches()]
        if not pieces:  # it has no rows
            return pa.RecordBatch.from_pylist([], schema=pa.schema([(name, type_of(name)) for name in columns]))
        return _one_batch(pa.Table.from_batches(pieces))

    def batches(self, columns: Iterable[str], *, most_rows: int | None = None) -> Iterator[pa.RecordBatch]:
        names = list(columns)
        if most_rows is None or most_rows >= self.num_rows:
            return (normalise(piece, names) for piece in self._files.pieces(names))
        firsts = np.cumsum([0, *(groups for _, groups in self._files.sizes)])
        wanted = min(_MOST_GROUPS_LOOKED_AT, -(-most_rows * int(firsts[-1]) // self.num_rows))
        return (self._some_group(firsts, number, names) for number in _spread(int(firsts[-1]), wanted))

    def _some_group(self, firsts: np.ndarray, number: int, columns: list[str]) -> pa.RecordBatch:
        """The number-th row group of all files."""
        file = int(np.searchsorted(firsts, number, side="right")) - 1
        return self._read_group(self._files.paths[file], number - int(firsts[file]), columns)

    def has_null_ids(self) -> bool:
        """False: looking at all of them takes too long, and a row without one is an error where it is read."""
        return False

    @functools.cached_property
    def fingerprint(self) -> dict:
        return _made_once(_copy_path(self._files).with_suffix(_FINGERPRINT), self._take_fingerprint)

    def _take_fingerprint(self) -> dict:
        sample = Fingerprint()
        for file in np.unique(np.linspace(0, len(self._files.paths) - 1, _SAMPLED_FILES).astype(int)):
            groups = self._files.sizes[file][1]
            if groups:
                sample.update(self._read_group(self._files.paths[file], groups // 2))
        return sample.digests() | {"num_rows": self.num_rows, "footers": self._files.footers_digest()}
