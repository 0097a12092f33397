"""The columns of a manifest: their names, their types, and their values as Python objects."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.modalities import MEDIA
from pipeline.data.spec import DataSetSpec, TaskSpec

WORD_COLUMNS = ("text", "labels")
TIME_COLUMNS = ("start_s", "end_s")
# Marks a text or label whose bytes are not UTF-8; escaped bytes follow. A noncharacter, which Unicode reserves for a
# program's own use and which passes through Arrow unchanged.
NOT_UTF8 = "\ufdd0"
# Maximum bytes shown of such a text.
_MAX_SHOWN = 80
# Maximum bytes kept of a text or label: the longest that ``text.max_characters`` may allow.
MAX_TEXT_BYTES = 4 << 20
_STRINGS = pa.large_list(pa.large_string())
# Column → the type its values are cast to. Any other column is one of a modality that the recipe adds.
TYPES = (
    dict.fromkeys(("id", *MEDIA), pa.large_string())
    | dict.fromkeys(WORD_COLUMNS, _STRINGS)
    | dict.fromkeys(TIME_COLUMNS, pa.float64())
)


def type_of(name: str) -> pa.DataType:
    """The type that a column's values are cast to; columns of added modalities hold paths."""
    return TYPES.get(name, pa.large_string())


def _is_string(found: pa.DataType) -> bool:
    if pa.types.is_dictionary(found):
        found = found.value_type
    # A column of nulls alone has no better type.
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(kind(found) for kind in kinds)


def _is_strings(found: pa.DataType) -> bool:
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return (any(kind(found) for kind in kinds) and _is_string(found.value_type)) or pa.types.is_null(found)


def _is_number(found: pa.DataType) -> bool:
    kinds = (pa.types.is_floating, pa.types.is_integer, pa.types.is_decimal, pa.types.is_null)
    return any(kind(found) for kind in kinds)


_KINDS = {
    pa.large_string(): ("a string", _is_string),
    _STRINGS: ("a list of strings", _is_strings),
    pa.float64(): ("a number of seconds", _is_number),
}


def type_fault(name: str, found: pa.DataType) -> str | None:
    """A message if a column's type cannot be read as the one it should have; None if it can."""
    expected, fits = _KINDS[type_of(name)]
    return None if fits(found) else f"expected {expected}, found {found}"


def usable(schema: pa.Schema, media: tuple[str, ...] = ()) -> list[str]:
    """The known columns of a schema whose type can be read. media: columns of added modalities."""
    known = (*TYPES, *media)
    return [name for name in known if name in schema.names and type_fault(name, schema.field(name).type) is None]


def _shortened(column: pa.LargeListArray) -> pa.LargeListArray:
    """The same lists, their strings cut to ``MAX_TEXT_BYTES`` at the end of a character."""
    flat = column.flatten().cast(pa.large_binary())
    lengths = pc.binary_length(flat)
    if (pc.max(lengths).as_py() or 0) <= MAX_TEXT_BYTES:
        return column
    cut = [_whole_characters(v) for v in pc.binary_slice(flat, 0, MAX_TEXT_BYTES + 1).to_pylist()]
    counts = pc.list_value_length(column)
    starts = np.concatenate([[0], np.cumsum(counts.fill_null(0).to_numpy())])
    # A null offset makes its list null.
    offsets = pa.array(starts, pa.int64(), mask=np.append(column.is_null().to_numpy(zero_copy_only=False), False))
    return pa.LargeListArray.from_arrays(offsets, pa.array(cut, pa.large_binary()).view(pa.large_string()))


def _whole_characters(value: bytes | None) -> bytes | None:
    if value is None or len(value) <= MAX_TEXT_BYTES:
        return value
    end = MAX_TEXT_BYTES
    # A character of UTF-8 starts with no byte of the form 10xxxxxx.
    while end and value[end] & 0xC0 == 0x80:
        end -= 1
    return value[:end]


def normalise(piece: pa.RecordBatch, columns: list[str]) -> pa.RecordBatch:
    """Columns in their types (``type_of``); a missing column is all null."""

    def column(name: str) -> pa.Array:
        if name not in piece.schema.names:
            return pa.nulls(len(piece), type_of(name))
        found = piece.column(name).cast(type_of(name))
        return _shortened(found) if name in WORD_COLUMNS else found

    return pa.RecordBatch.from_arrays([column(name) for name in columns], names=columns)


def values(column: pa.Array, name: str) -> list:
    """``to_pylist`` for strings that may not be UTF-8. Such texts and labels are marked by ``NOT_UTF8``.

    Other bytes are escaped as "\\xff". Texts and labels are without nulls.
    """
    try:
        found = column.to_pylist()
    except UnicodeDecodeError:
        raw = pa.large_list(pa.large_binary()) if name in WORD_COLUMNS else pa.large_binary()
        found = [_readable(value, marked=name in WORD_COLUMNS) for value in column.cast(raw).to_pylist()]
    return [_without_nulls(words) for words in found] if name in WORD_COLUMNS else found


def _readable(value: bytes | list | None, *, marked: bool) -> str | list | None:
    if isinstance(value, list):
        return [_readable(v, marked=marked) for v in value]
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        # Ids stay whole, so that they stay different.
        return (NOT_UTF8 if marked else "") + value[: _MAX_SHOWN if marked else None].decode(errors="backslashreplace")


def _without_nulls(words: list | None) -> list | None:
    return [w for w in words if w is not None] if words and None in words else words


class Fingerprint:
    """Digests of the columns that a run's order and losses depend on; independent of how the rows are batched.

    Media columns are left out, so that files may move.
    """

    COLUMNS = ("id", *WORD_COLUMNS, *TIME_COLUMNS)

    def __init__(self):
        self.num_rows = 0
        # For each column: lengths of lists, lengths of strings, contents. Separate, so that batching does not matter.
        self._digests = {name: [hashlib.blake2b(digest_size=16) for _ in range(3)] for name in self.COLUMNS}

    def update(self, rows: pa.RecordBatch) -> None:
        """rows: as ``normalise`` gives them."""
        self.num_rows += len(rows)
        for name in self.COLUMNS:
            # A missing column counts as nulls.
            column = rows.column(name) if name in rows.schema.names else pa.nulls(len(rows), TYPES[name])
            self._update(name, column)

    def _update(self, name: str, column: pa.Array) -> None:
        lists, lengths, contents = self._digests[name]
        if pa.types.is_floating(column.type):
            contents.update(np.ascontiguousarray(column.to_numpy(zero_copy_only=False)))
            return
        if pa.types.is_large_list(column.type):
            lists.update(_lengths(pc.list_value_length(column)))
            column = column.flatten()
        column = column.cast(pa.large_binary())
        lengths.update(_lengths(pc.binary_length(column)))
        contents.update(_content(column))

    def digests(self) -> dict:
        """{"num_rows": of all, column: digest in hexadecimal}."""
        found = {name: hashlib.blake2b(digest_size=16) for name in self.COLUMNS}
        for name, parts in self._digests.items():
            for part in parts:
                found[name].update(part.digest())
        return {"num_rows": self.num_rows} | {name: digest.hexdigest() for name, digest in found.items()}


def _lengths(found: pa.Array) -> np.ndarray:
    """Lengths as int64; -1 for a null."""
    return np.ascontiguousarray(found.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)


def _content(column: pa.LargeBinaryArray) -> memoryview:
    """The bytes of all values, one after another."""
    if column.null_count:
        column = column.drop_null()
    _, offsets, data = column.buffers()
    if not len(column) or data is None:
        return memoryview(b"")
    ends = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
    return memoryview(data)[ends[0] : ends[-1]]


def needed_columns(task: TaskSpec, data_set: DataSetSpec, *, has: set[str]) -> dict[str, str]:
    """Manifest columns a task reads → why. Sound comes from the sound track if there is no audio column."""
    why = f"task {task.name}"
    columns = {"id": why}
    for modality in task.media:
        choices = data_set.modality(modality).columns_of(modality)
        columns[next((column for column in choices if column in has), choices[0])] = why
    if "text" in task.modalities:
        columns["labels" if task.text == "labels" else "text"] = why
    if task.classifies or task.positives == "labels":
        columns["labels"] = why
    return columns


def row_columns(task: TaskSpec, data_set: DataSetSpec) -> set[str]:
    """Manifest columns that a task may read of a row."""
    media = (data_set.modality(modality).columns_of(modality) for modality in task.media)
    words = needed_columns(task, data_set, has=set()).keys() & {"id", *WORD_COLUMNS}
    return {*words, *TIME_COLUMNS, *(column for columns in media for column in columns)}
