"""Rows as Arrow tables and back, bit for bit, with nothing that needs unpickling."""

import io

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from pipeline.data.plan import Row
from pipeline.data.wire import WIRE_SCHEMA, failure_to_arrow, from_arrow, to_arrow
from pipeline.errors import DataError, RequestError

DTYPES = [np.uint8, np.int32, np.int64, np.float32, np.bool_]
REJECTS = [{"id": "b", "data_set": "d", "source": "/x.png", "reason": "missing_file", "detail": "'quote' \u2028 ü"}]


def row(batch: int = 0, **arrays: np.ndarray) -> Row:
    return Row("task", batch, 1, "32x32", ["a", "ü"], REJECTS, dict(arrays))


def through_a_file(table: pa.Table) -> pa.Table:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return pa.ipc.open_stream(sink.getvalue()).read_all()


@given(
    array=st.sampled_from(DTYPES).flatmap(
        lambda dtype: st_numpy.arrays(dtype, st_numpy.array_shapes(min_dims=0, max_dims=4, max_side=4))
    )
)
@settings(max_examples=50, deadline=None)
def test_arrays_come_back_bit_for_bit(array):
    (back,) = from_arrow(through_a_file(to_arrow([row(**{"vision/tokens": array})])))
    found = back.arrays["vision/tokens"]
    assert found.dtype == array.dtype and found.shape == array.shape and found.tobytes() == array.tobytes()


def test_rows_come_back_in_order_with_all_they_hold():
    arrays = {"vision/tokens": np.arange(6).reshape(2, 3), "labels": np.ones((2, 4), np.uint8)}
    rows = [row(batch, **{name: a + batch for name, a in arrays.items()}) for batch in range(3)]
    back = list(from_arrow(through_a_file(to_arrow(rows))))
    for old, new in zip(rows, back, strict=True):
        for name in ("task", "batch", "rank", "variant", "ids", "rejects"):
            assert getattr(new, name) == getattr(old, name)
        assert list(new.arrays) == list(old.arrays)
        assert all((new.arrays[name] == old.arrays[name]).all() for name in arrays)


def test_views_and_other_layouts_are_copied_right():
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    for strange in (array.T, array[::2, ::-1], np.asfortranarray(array)):
        (back,) = from_arrow(to_arrow([row(x=strange)]))
        assert (back.arrays["x"] == strange).all()


def test_an_empty_array_keeps_its_shape():
    (back,) = from_arrow(through_a_file(to_arrow([row(x=np.zeros((0, 5), np.float32))])))
    assert back.arrays["x"].shape == (0, 5)


def test_no_rows():
    assert list(from_arrow(to_arrow([]))) == []


def plain_types(kind: pa.DataType) -> set[str]:
    if isinstance(kind, pa.BaseExtensionType):
        return {"extension"}
    if pa.types.is_struct(kind):
        return set().union(*(plain_types(field.type) for field in kind))
    if pa.types.is_list(kind):
        return plain_types(kind.value_type)
    return {str(kind)}


def test_the_schema_holds_plain_types_only():
    found = set().union(*(plain_types(field.type) for field in WIRE_SCHEMA))
    assert found == {"string", "int64", "large_binary"}
    assert to_arrow([row(x=np.zeros(3))]).schema.equals(WIRE_SCHEMA)


def test_objects_do_not_travel():
    with pytest.raises(TypeError, match="Python objects cannot be sent"):
        list(from_arrow(to_arrow([row(x=np.array([{"a": 1}], object))])))


@pytest.mark.parametrize("kind", [DataError, RequestError])
def test_errors_travel_as_what_they_are(kind):
    with pytest.raises(kind, match="storage: a could not be read"):
        list(from_arrow(failure_to_arrow(kind("storage: a could not be read"))))
