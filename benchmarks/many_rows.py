"""A manifest of 10^8 rows that is copied, one of 10^10 rows that is read in place, and 10^6 rejects. JSON.

    python -m benchmarks.many_rows [--quick] [--copied | --placed]

Each stage runs in a process of its own: seconds, and the most memory in MB that it held beyond its imports and the file
pages that it maps. A folder of the present disk takes some 18 GB and is removed afterwards.

copied: 100 files, each one row group of 10^6 rows, as pyarrow, pandas and Spark write them. start: what `imp pretrain`
does with the manifest before anything else runs: its rows are found and copied, their ids compared. batch: 64 rows in a
task's order, of a process that has just begun; further: the next 20, one row in a hundred with a substitute. resume:
the start of a machine that has the copy, and the rejects of the run's journals, one row in a hundred, parsed and made
ready to be sent.

placed: one file of 10^6 rows in row groups of 1,024 under 10,000 names, read in place; the same stages without rejects.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks import timing
from pipeline.data.ids import repeats
from pipeline.data.manifest import Manifest
from pipeline.data.order import Order
from pipeline.data.row_index import RowIndex
from pipeline.train.quarantine import known_bad

SIZES = {
    "quick": {"files": 2, "rows": 20_000, "links": 20, "rejects": 1000},
    "cpu": {"files": 100, "rows": 1_000_000, "links": 10_000, "rejects": 1_000_000},
}
_BATCH = 64
_COLUMNS = ("id", "image", "text")


def write(path: Path, first: int, num_rows: int, *, group: int) -> None:
    """A file of rows with an image, a caption and a label."""
    rows = np.arange(first, first + num_rows)
    numbers, offsets = pa.array(rows).cast(pa.string()), pa.array(np.arange(num_rows + 1), pa.int32())
    table = {
        "id": numbers,
        "image": pc.binary_join_element_wise("images/train/", numbers, ".jpg", ""),
        "text": pa.ListArray.from_arrays(offsets, pc.binary_join_element_wise("a picture of number ", numbers, "")),
        "labels": pa.ListArray.from_arrays(offsets, pa.array(rows // 1000).cast(pa.string())),
    }
    pq.write_table(pa.table(table), path, row_group_size=group)


def write_journals(run_dir: Path, num_rejects: int) -> None:
    """The journals of 16 ranks, with every hundredth row."""
    (run_dir / "quarantine").mkdir(parents=True)
    for rank in range(16):
        with open(run_dir / "quarantine" / f"rank-{rank}.jsonl", "w", encoding="utf-8") as file:
            for number in range(rank, num_rejects, 16):
                row = str(100 * number)
                reject = {"id": row, "data_set": "pets", "source": f"/data/images/train/{row}.jpg"}
                reject |= {"reason": "missing_file", "detail": f"/data/images/train/{row}.jpg", "task": "t", "step": 7}
                file.write(json.dumps(reject) + "\n")


def _own_memory() -> float:
    """MB of this process that no file backs."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) / 1024


def _watched(stage: Callable[..., dict], connection: Any, *args: Any) -> None:
    before, most, ended = _own_memory(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.02):
            most = max(most, _own_memory() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    found = stage(*args)
    found["seconds"] = time.perf_counter() - began
    ended.set()
    watcher.join()
    connection.send(found | {"memory_MB": most})


def in_a_process(stage: Callable[..., dict], *args: Any) -> dict:
    """The result of a stage in a process of its own, with its seconds and its memory."""
    context = multiprocessing.get_context("spawn")
    mine, other = context.Pipe(duplex=False)
    process = context.Process(target=_watched, args=(stage, other, *args))
    process.start()
    other.close()
    found = mine.recv()
    process.join()
    return found


def start(uri: str, index_path: Path) -> dict:
    manifest = Manifest(uri)
    manifest.require(dict.fromkeys(_COLUMNS, "a task"))
    index = manifest.index
    began = time.perf_counter()
    found = repeats(manifest)
    index_path.write_bytes(pickle.dumps(index))
    return {
        "rows": manifest.num_rows,
        "of it ids, s": time.perf_counter() - began,
        "ids compared": found.looked_at,
        "index, bytes": index_path.stat().st_size,
    }


def _opened(uri: str, index_path: Path) -> tuple[Manifest, Order]:
    known: RowIndex = pickle.loads(index_path.read_bytes())
    manifest = Manifest(uri, known=known, columns=_COLUMNS)
    return manifest, Order(0, "task", manifest.num_rows)


def first_batch(uri: str, index_path: Path) -> dict:
    manifest, order = _opened(uri, index_path)
    for row in order.rows(np.arange(_BATCH))[0].tolist():
        manifest.row(row)
    return {}


def further_batches(uri: str, index_path: Path) -> dict:
    manifest, order = _opened(uri, index_path)
    positions = np.arange(_BATCH, 21 * _BATCH)
    began = time.perf_counter()
    for position, row in zip(positions.tolist(), order.rows(positions)[0].tolist(), strict=True):
        manifest.row(row)
        if position % 100 == 0:
            manifest.row(order.substitute(position, 0, row=row))
    return {"row, ms": 1000 * (time.perf_counter() - began) / len(positions)}


def resume(uri: str, run_dir: Path | None) -> dict:
    manifest = Manifest(uri)
    manifest.require(dict.fromkeys(_COLUMNS, "a task"))
    _ = manifest.index
    began = time.perf_counter()
    if run_dir is None:
        return {}
    rejects = known_bad(run_dir)["t"]
    found = {"of it rejects, s": time.perf_counter() - began, "rejects": len(rejects)}
    found["rejects, bytes sent"] = len(pickle.dumps(rejects))
    began = time.perf_counter()
    assert all(rejects.reason(str(100 * n)) for n in range(1000)) and rejects.reason("1") is None
    return found | {"a look, us": 1000 * (time.perf_counter() - began)}


def stages(folder: Path, run_dir: Path | None) -> Iterator[tuple[str, dict]]:
    uri, index_path = str(folder), folder.with_suffix(".index")
    yield "start", in_a_process(start, uri, index_path)
    yield "batch", in_a_process(first_batch, uri, index_path)
    yield "further", in_a_process(further_batches, uri, index_path)
    yield "resume", in_a_process(resume, uri, run_dir)


def copied(work: Path, sizes: dict) -> dict:
    (work / "copied").mkdir()
    write_journals(work / "run", sizes["rejects"])
    for number in range(sizes["files"]):
        write(work / f"copied/{number:05d}.parquet", number * sizes["rows"], sizes["rows"], group=1 << 20)
    return dict(stages(work / "copied", work / "run"))


def placed(work: Path, sizes: dict) -> dict:
    (work / "placed").mkdir()
    write(work / "file", 0, sizes["rows"], group=1024)
    for number in range(sizes["links"]):
        os.link(work / "file", work / f"placed/{number:05d}.parquet")
    return dict(stages(work / "placed", None))


def main() -> None:
    asked = timing.arguments(__doc__, copied="that manifest alone", placed="that manifest alone")
    sizes, found = SIZES["quick" if asked.quick else "cpu"], {}
    with tempfile.TemporaryDirectory(dir=".") as name:
        work = Path(name).absolute()
        os.environ["IMP_CACHE"] = str(work / "cache")
        if not asked.placed:
            found["copied"] = copied(work, sizes)
        if not asked.copied:
            found["placed"] = placed(work, sizes)
    timing.show({"machine": timing.machine(), "sizes": sizes, **found})


if __name__ == "__main__":
    main()
