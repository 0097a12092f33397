"""quarantine.parquet: the journal of rejects as a table for people and tools."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.files import whole_file
from pipeline.train.quarantine import read_journal

SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("id", "data_set", "source", "reason", "detail", "task")] + [("step", pa.int64())]
)


def write_table(run_dir: Path) -> Path:
    """One row for each rejected sample and reason, the first time it was met; empty where there is none."""
    path = Path(run_dir) / "quarantine.parquet"
    first = {}
    for record in sorted(read_journal(run_dir), key=lambda r: r["step"]):
        first.setdefault((record["data_set"], record["id"], record["reason"]), record)
    with whole_file(path) as temporary:
        pq.write_table(pa.Table.from_pylist(list(first.values()), schema=SCHEMA), temporary)
    return path
