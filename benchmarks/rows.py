"""Reading the rows of a manifest in random order: from a copy, in place, and as Parquet reads them. JSON.

    python -m benchmarks.rows [--quick]

A manifest of a million rows (path, caption, label) is written with row groups of 1,024 rows and of 2^20, pyarrow's
default. copy_s: seconds of the first start, which makes the copy. Milliseconds a row, for rows in a task's order: from
the copy; from row groups in place, as manifests too large for a copy are read; and decoding the row group anew for each
row, large groups included. ratio: the last over the first.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks import timing
from pipeline.data import row_groups
from pipeline.data.manifest import Manifest
from pipeline.data.order import Order
from pipeline.data.parquet_files import ParquetFiles

SIZES = {"quick": {"rows": 20_000, "read": 200, "groups": 3}, "cpu": {"rows": 1_000_000, "read": 5000, "groups": 20}}
_GROUPS = (1024, 1 << 20)


def write(path: Path, num_rows: int, *, group: int) -> None:
    numbers = pa.array(np.arange(num_rows)).cast(pa.string())
    offsets = pa.array(np.arange(num_rows + 1), pa.int32())
    table = {
        "id": numbers,
        "image": pc.binary_join_element_wise("images/train/", numbers, ".jpg", ""),
        "text": pa.ListArray.from_arrays(offsets, pc.binary_join_element_wise("a picture of number ", numbers, "")),
        "labels": pa.ListArray.from_arrays(offsets, pa.array(np.arange(num_rows) // 1000).cast(pa.string())),
    }
    pq.write_table(pa.table(table), path, row_group_size=group)


def milliseconds(read, rows: list[int]) -> float:
    read(rows[0])
    began = time.perf_counter()
    for row in rows:
        read(row)
    return 1000 * (time.perf_counter() - began) / len(rows)


def measure(path: Path, sizes: dict) -> dict:
    began = time.perf_counter()
    manifest = Manifest(str(path))
    manifest.row(0)
    copy_s = time.perf_counter() - began
    rows = Order(0, "task", manifest.num_rows).rows(np.arange(sizes["read"]))[0].tolist()
    files = ParquetFiles(str(path))
    group = files.footer(str(path)).row_group(0).num_rows
    few = rows[: sizes["groups"]]
    found = {"copy_s": copy_s, "copy, ms": milliseconds(manifest.row, rows)}
    if group <= 1024:
        found["in place, ms"] = milliseconds(row_groups.RowGroups(files).row, rows[: sizes["read"] // 5])
    found["Parquet, ms"] = milliseconds(lambda row: files.group(str(path), row // group, ["id", "text"]), few)
    return found | {"ratio": found["Parquet, ms"] / found["copy, ms"]}


def main() -> None:
    sizes = SIZES["quick" if timing.arguments(__doc__).quick else "cpu"]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["IMP_CACHE"] = str(Path(folder) / "cache")
        found = {}
        for group in _GROUPS:
            path = Path(folder) / f"groups-of-{group}.parquet"
            write(path, sizes["rows"], group=group)
            found[f"row groups of {group}"] = measure(path, sizes)
    timing.show({"machine": timing.machine(), "sizes": sizes, **found})


if __name__ == "__main__":
    main()
