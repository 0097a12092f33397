"""What every demo set shares: its plan, stable choices, and files that are whole or absent."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.files import TEMPORARY_SUFFIX, write_bytes

ROWS_PER_GROUP = 512


@dataclass(frozen=True)
class Plan:
    """One set before it is built.

    `jobs`: one dict of JSON values for each media file, with its `path` below the corpus root and whatever the
    set's `render` needs. `manifests`: split name to rows; a row's media path is relative to the set's folder.
    """

    name: str
    jobs: list[dict[str, Any]]
    manifests: dict[str, list[dict[str, Any]]]


def stable_hash(*parts: str | int) -> int:
    """A 64-bit number that depends on `parts` alone.

    Splits are chosen by it, not by a random generator: numpy does not promise the same stream in later releases.
    """
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def first_rows(rows: list, *, limit: int | None, share: float) -> list:
    """The first rows of a split that gets `share` of a set of `limit` rows: at least one; all without a limit."""
    return rows if limit is None else rows[: max(1, round(limit * share))]


def is_written(path: Path) -> bool:
    """True if the file is there and not empty; a power cut can leave an empty file behind a finished rename."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def write_whole(path: Path, data: bytes) -> None:
    """Writes `data` under a temporary name and renames it: a reader sees the whole file or none.

    A file that already holds `data` is left alone.
    """
    if is_written(path) and path.stat().st_size == len(data) and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Thousands of small files: what a power cut took is noticed and built again (``is_written``).
    write_bytes(path, data, durable=False)


def remove_temporary_files(root: Path) -> None:
    """Removes what a killed build left half-written."""
    for path in root.rglob(f".*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)


def write_manifest(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows as Parquet; the columns are those of the first row, in its order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    strings = pa.list_(pa.string())
    types = {"text": strings, "labels": strings, "source_digit": pa.int64()}
    schema = pa.schema([(name, types.get(name, pa.string())) for name in rows[0]])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), sink, row_group_size=ROWS_PER_GROUP)
    write_whole(path, sink.getvalue().to_pybytes())


def count_rows(path: Path) -> int:
    """The number of rows of a Parquet file, or -1 if it is absent or not readable."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowInvalid):
        return -1
