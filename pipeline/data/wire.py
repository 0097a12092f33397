"""The wire form of rows: an Arrow table of bytes and shapes, no tensor types, nothing pickled."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pipeline.data.plan import Row
from pipeline.errors import DataError, RequestError

_ARRAY = pa.struct(
    [("name", pa.string()), ("dtype", pa.string()), ("shape", pa.list_(pa.int64())), ("data", pa.large_binary())]
)
_PLAIN = ("task", "batch", "rank", "variant", "ids")
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
    columns = {name: [getattr(row, name) for row in rows] for name in _PLAIN}
    columns["rejects"] = [json.dumps(row.rejects) for row in rows]
    items = [item for row in rows for item in row.arrays.items()]
    described = [
        pa.array([name for name, _ in items], pa.string()),
        pa.array([array.dtype.str for _, array in items], pa.string()),
        pa.array([array.shape for _, array in items], pa.list_(pa.int64())),
        _binary([array for _, array in items]),
    ]
    offsets = pa.array(np.cumsum([0, *(len(row.arrays) for row in rows)]), pa.int32())
    columns["arrays"] = pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(described, fields=list(_ARRAY)))
    return pa.table(columns, schema=WIRE_SCHEMA)


def failure_to_arrow(error: DataError | RequestError) -> pa.Table:
    """An error of a stream as a table of WIRE_SCHEMA: Ray would wrap it and lose its type."""
    row = Row(task="", batch=-1, rank=-1, variant=type(error).__name__, ids=[str(error)], rejects=[], arrays={})
    return to_arrow([row])


def _binary(arrays: list[np.ndarray]) -> pa.Array:
    """The bytes of each array, copied once: batches are tens of megabytes."""
    if any(a.dtype.hasobject for a in arrays):
        raise TypeError("arrays of Python objects cannot be sent")
    ends = np.cumsum([0, *(a.nbytes for a in arrays)], dtype=np.int64)
    data = np.empty(ends[-1], np.uint8)
    for array, start, end in zip(arrays, ends[:-1], ends[1:], strict=True):
        data[start:end].view(array.dtype).reshape(array.shape)[...] = array
    return pa.Array.from_buffers(pa.large_binary(), len(arrays), [None, pa.py_buffer(ends), pa.py_buffer(data)])


def from_arrow(table: pa.Table) -> Iterator[Row]:
    """The rows of ``to_arrow``; arrays are views of the table's memory. Raises the error of ``failure_to_arrow``."""
    for index in range(table.num_rows):
        record = {name: table[name][index] for name in WIRE_SCHEMA.names}
        arrays = {}
        for item in record["arrays"]:
            dtype, shape = np.dtype(item["dtype"].as_py()), item["shape"].as_py()
            arrays[item["name"].as_py()] = np.frombuffer(item["data"].as_buffer(), dtype).reshape(shape)
        plain = {name: record[name].as_py() for name in _PLAIN}
        if plain["batch"] < 0:
            kind = DataError if plain["variant"] == DataError.__name__ else RequestError
            raise kind(plain["ids"][0])
        yield Row(**plain, rejects=json.loads(record["rejects"].as_py()), arrays=arrays)
