"""The wire form of rows: an Arrow table of bytes and shapes, no tensor types, nothing pickled."""

from __future__ import annotations

import itertools
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


def failure_to_arrow(error: DataError | RequestError, *, task: str = "", batch: int = 0, rank: int = 0) -> pa.Table:
    """An error of a stream as a table of WIRE_SCHEMA: Ray would wrap it and lose its type.

    batch: the first one of those that could not be made; a negative number in the table, which tells it from a row.
    """
    kind, text = type(error).__name__, str(error)
    return to_arrow([Row(task=task, batch=-1 - batch, rank=rank, variant=kind, ids=[text], rejects=[], arrays={})])


def first_of(table: pa.Table) -> tuple[str, int, int]:
    """(task, batch, rank) of a table's first row, or of the first one that could not be made."""
    task, batch, rank = (table[name][0].as_py() for name in ("task", "batch", "rank"))
    return task, batch if batch >= 0 else -1 - batch, rank


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
    for part in table.to_batches():
        arrays = part.column("arrays")
        starts, items = arrays.offsets.to_pylist(), arrays.values
        described = [items.field(name).to_pylist() for name in ("name", "dtype", "shape")]
        views = _views(items.field("data"))
        for index in range(part.num_rows):
            plain = {name: part.column(name)[index].as_py() for name in _PLAIN}
            if plain["batch"] < 0:
                kind = DataError if plain["variant"] == DataError.__name__ else RequestError
                raise kind(plain["ids"][0])
            mine = slice(starts[index], starts[index + 1])
            named = zip(*(values[mine] for values in described), views[mine], strict=True)
            rejects = json.loads(part.column("rejects")[index].as_py())
            yield Row(**plain, rejects=rejects, arrays={n: v.view(d).reshape(s) for n, d, s, v in named})


def _views(data: pa.LargeBinaryArray) -> list[np.ndarray]:
    """The bytes of each value, not copied: ``as_buffer`` of a value that is part of a struct would copy them."""
    _, ends, values = data.buffers()
    edges = np.frombuffer(ends, np.int64)[data.offset : data.offset + len(data) + 1]
    # A buffer of no bytes may be absent.
    flat = np.frombuffer(values, np.uint8) if values is not None and values.size else np.empty(0, np.uint8)
    return [flat[start:stop] for start, stop in itertools.pairwise(edges.tolist())]
