"""Reading the rows of a manifest in random order: from a copy, in place, and as Parquet reads them. JSON.

    python -m benchmarks.rows [--quick]

A manifest of a million rows (path, caption, label) is written with row groups of 1,024 rows and of 2^20, pyarrow's
default. copy_s: seconds of the first start, which makes the copy. Milliseconds a row, for rows in a task's order: from
the copy; from row groups in place, as manifests too large for a copy are read; and decoding the row group anew for each
row, large groups included. ratio: the last over the first.

many files: read in place, as above the limit for a copy, with row groups of 1,024 rows. start_s: of the first machine,
which reads all footers; open_ms: of a decode process that has the run's index; milliseconds a row, and of a row with a
substitute, from near it and from all rows. ten billion rows: a made-up index of 10^6 row groups: its bytes, as it
travels; milliseconds to open it, megabytes that it holds, microseconds to find a row's group.
"""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks import timing
from pipeline.data import row_groups, row_table
from pipeline.data.file_index import FileIndex, FileSummary
from pipeline.data.manifest import Manifest
from pipeline.data.order import Order
from pipeline.data.parquet_files import ParquetFiles

SIZES = {
    "quick": {"rows": 20_000, "read": 200, "groups": 3, "files": 20, "rows_per_file": 2048, "index_files": 100},
    "cpu": {
        "rows": 1_000_000,
        "read": 5000,
        "groups": 20,
        "files": 10_000,
        "rows_per_file": 4096,
        "index_files": 10_000,
    },
}
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


def many_files(folder: Path, sizes: dict) -> dict:
    folder.mkdir()
    write(folder / "00000.parquet", sizes["rows_per_file"], group=1024)
    for number in range(1, sizes["files"]):
        shutil.copyfile(folder / "00000.parquet", folder / f"{number:05d}.parquet")
    row_table._MAX_COPIED_ROWS = 0
    began = time.perf_counter()
    known = Manifest(str(folder)).index
    start_s = time.perf_counter() - began
    began = time.perf_counter()
    manifest = Manifest(str(folder), known=pickle.loads(pickle.dumps(known)), columns=("id", "image", "labels"))
    _ = manifest.fingerprint
    open_ms = 1000 * (time.perf_counter() - began)
    positions = np.arange(min(500, manifest.num_rows // 50))
    order = Order(0, "task", manifest.num_rows)
    rows = order.rows(positions)[0].tolist()
    near = [row - row % 64 + (row + 9) % 64 for row in rows]
    found = {"start_s": start_s, "index_bytes": len(known.files), "open_ms": open_ms}
    found["row, ms"] = milliseconds(manifest.row, rows)
    found["row and substitute near it, ms"] = milliseconds(
        lambda pair: (manifest.row(pair[0]), manifest.row(pair[1])), list(zip(rows, near, strict=True))
    )
    far = [order.substitute(p, 0, row=0) for p in positions.tolist()]
    found["row and substitute from all rows, ms"] = milliseconds(
        lambda pair: (manifest.row(pair[0]), manifest.row(pair[1])), list(zip(rows, far, strict=True))
    )
    return found


def ten_billion(num_files: int) -> dict:
    """Files of 100 row groups of 10,000 rows, every tenth file uneven."""
    even, uneven = np.full(100, 10_000), np.array([9_999, 10_001] * 50)
    summaries = [FileSummary(10**8, n.to_bytes(16, "big"), uneven if n % 10 == 3 else even) for n in range(num_files)]
    data = FileIndex.of([f"bucket/part-{n:05d}.parquet" for n in range(num_files)], summaries).to_bytes()
    tracemalloc.start()
    index = FileIndex.from_bytes(data)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    began = time.perf_counter()
    FileIndex.from_bytes(data)
    open_ms = 1000 * (time.perf_counter() - began)
    rows = Order(0, "task", index.num_rows).rows(np.arange(5000))[0].tolist()
    found = {"rows": index.num_rows, "groups": index.num_groups, "bytes": len(data), "open_ms": open_ms}
    return found | {"held_MB": held / 1e6, "find a row, us": 1000 * milliseconds(index.group_of, rows)}


def main() -> None:
    sizes = SIZES["quick" if timing.arguments(__doc__).quick else "cpu"]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["IMP_CACHE"] = str(Path(folder) / "cache")
        found = {}
        for group in _GROUPS:
            path = Path(folder) / f"groups-of-{group}.parquet"
            write(path, sizes["rows"], group=group)
            found[f"row groups of {group}"] = measure(path, sizes)
        found["many files"] = many_files(Path(folder) / "files", sizes)
    found["ten billion rows"] = ten_billion(sizes["index_files"])
    timing.show({"machine": timing.machine(), "sizes": sizes, **found})


if __name__ == "__main__":
    main()
