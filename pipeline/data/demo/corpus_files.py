"""Files of the demo corpus: whole or absent, and left alone if they hold the right content."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.files import TEMPORARY_SUFFIX, write_bytes

# Rows of a Parquet row group.
_ROWS_PER_GROUP = 512


def is_written(path: Path) -> bool:
    """Whether the file exists and is not empty: a power cut can leave an empty file after a completed rename."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name and renames it, unless it already holds ``data``."""
    if is_written(path) and path.stat().st_size == len(data) and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not durable, as there are thousands of small files: one lost in a power cut is noticed (``is_written``).
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
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), sink, row_group_size=_ROWS_PER_GROUP)
    write_whole(path, sink.getvalue().to_pybytes())


def count_rows(path: Path) -> int:
    """The number of rows of a Parquet file, -1 if it is absent or not readable."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowInvalid):
        return -1
