"""The wire form of rows: an Arrow table of bytes and shapes, no tensor types, nothing pickled."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa

from pipeline.data.plan import Row

_ARRAY = pa.struct(
    [("name", pa.string()), ("dtype", pa.string()), ("shape", pa.list_(pa.int64())), ("data", pa.large_binary())]
)
WIRE_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("batch", pa.int64()),
        ("rank", pa.int64()),
        ("variant", pa.string()),
        ("ids", pa.list_(pa.string())),
        ("rejects", pa.string()),
        ("arrays", pa.list_(_ARRAY)),
    ]
)


def to_arrow(rows: list[Row]) -> pa.Table:
    """Rows as a table of WIRE_SCHEMA."""
    columns = {name: [] for name in WIRE_SCHEMA.names}
    for row in rows:
        for name in ("task", "batch", "rank", "variant", "ids"):
            columns[name].append(getattr(row, name))
        columns["rejects"].append(json.dumps(row.rejects))
        columns["arrays"].append(
            [
                {"name": n, "dtype": a.dtype.str, "shape": a.shape, "data": np.ascontiguousarray(a).tobytes()}
                for n, a in row.arrays.items()
            ]
        )
    return pa.table(columns, schema=WIRE_SCHEMA)


def from_arrow(table: pa.Table):
    """The rows of ``to_arrow``; arrays are views of the table's memory."""
    for index in range(table.num_rows):
        record = {name: table[name][index] for name in WIRE_SCHEMA.names}
        arrays = {}
        for item in record["arrays"]:
            dtype, shape = np.dtype(item["dtype"].as_py()), item["shape"].as_py()
            arrays[item["name"].as_py()] = np.frombuffer(item["data"].as_buffer(), dtype).reshape(shape)
        plain = {name: record[name].as_py() for name in ("task", "batch", "rank", "variant", "ids")}
        yield Row(**plain, rejects=json.loads(record["rejects"].as_py()), arrays=arrays)
