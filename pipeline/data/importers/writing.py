"""Rows to Parquet manifests: checked, streamed, whole or absent."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.columns import NOT_UTF8
from pipeline.data.importers.listing import Skipped
from pipeline.data.modalities import MEDIA
from pipeline.data.order import name_key
from pipeline.data.repeated import Repeated
from pipeline.files import whole_file

_STRINGS = pa.list_(pa.string())
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        *((m, pa.string()) for m in MEDIA),
        ("text", _STRINGS),
        ("labels", _STRINGS),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
    ]
)
_ROWS_PER_GROUP = 1024
# Characters of texts, or bytes of rows, after which a row group ends before it has as many rows.
_MAX_CHARACTERS = 32 << 20
# Maximum bytes that are kept of a text that is not UTF-8, for people to see.
_MAX_SHOWN = 80


class _Writer:
    """Writes one manifest, first as a draft that has the rows with an earlier row's id too, and all columns.

    folder: of the manifest. drafts: for the draft and what is needed to find repeated ids.
    """

    def __init__(self, path: Path, drafts: Path):
        self._folder = path.parent
        self._draft = drafts / path.name
        self._writer = pq.ParquetWriter(self._draft, SCHEMA)
        self._rows: list[dict] = []
        self._characters = 0
        self._ids = array("Q")
        parts = drafts / f"{path.name}.ids"
        parts.mkdir()
        self._repeated = Repeated(parts)
        self.num_rows = 0

    def add(self, row: dict, digest: int) -> None:
        """Takes a row. digest: of its id."""
        row = dict(row)
        for column in MEDIA:
            if row.get(column):
                # Paths below the manifest's folder are relative to it, so that both can move together.
                row[column] = row[column].removeprefix(f"{self._folder}/")
        self._rows.append(row)
        self._ids.append(digest)
        self._characters += sum(map(len, row.get("text") or ()))
        if len(self._rows) == _ROWS_PER_GROUP or self._characters > _MAX_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=SCHEMA))
        self._repeated.add(np.array(self._ids, np.uint64))
        self._rows.clear()
        self._ids = array("Q")
        self._characters = 0

    def end(self, skipped: Skipped) -> set[str]:
        """Ends the draft and counts the rows whose id an earlier one has. Returns the columns that others fill."""
        if self._rows:
            self._flush()
        self._writer.close()
        repeated = sum(int((entries["count"] - 1).sum()) for entries in self._repeated.entries())
        self.num_rows = self._repeated.num_hashes - repeated
        if repeated:
            skipped.add("the id of an earlier row", self._first_repeated(), count=repeated)
        filled: set[str] = set()
        for table in self._kept(SCHEMA.names):
            filled |= {name for name in set(SCHEMA.names) - filled if _is_filled(table[name])}
            if len(filled) == len(SCHEMA.names):
                break
        return filled

    def _first_repeated(self) -> str:
        return next(table["id"][0].as_py() for table in self._tables(["id"], later=True) if len(table))

    def _kept(self, columns: list[str]) -> Iterator[pa.Table]:
        return self._tables(columns, later=False)

    def _tables(self, columns: list[str], *, later: bool) -> Iterator[pa.Table]:
        """The rows of each row group of the draft that repeat an earlier id, or all others."""
        draft, start = pq.ParquetFile(self._draft), 0
        for group in range(draft.num_row_groups):
            table = draft.read_row_group(group, columns=columns).select(columns)
            chosen = self._repeated.later(start, start + len(table)) == later
            start += len(table)
            yield table if chosen.all() else table.filter(pa.array(chosen))

    def finish(self, columns: list[str], path: Path) -> None:
        """Writes the manifest."""
        with pq.ParquetWriter(path, pa.schema([SCHEMA.field(name) for name in columns])) as writer:
            held, rows, size = [], 0, 0
            for table in self._kept(columns):
                held.append(table)
                rows, size = rows + len(table), size + table.nbytes
                if rows >= _ROWS_PER_GROUP or size > _MAX_CHARACTERS:
                    writer.write_table(pa.concat_tables(held), row_group_size=_ROWS_PER_GROUP)
                    held, rows, size = [], 0, 0
            if rows:
                writer.write_table(pa.concat_tables(held), row_group_size=_ROWS_PER_GROUP)


def _is_filled(column: pa.ChunkedArray) -> bool:
    """Whether any value is neither null nor empty."""
    if pa.types.is_floating(column.type):
        return column.null_count < len(column)
    lengths = pc.list_value_length(column) if pa.types.is_list(column.type) else pc.binary_length(column)
    return (pc.max(lengths).as_py() or 0) > 0


def _in_utf8(row: dict, skipped: Skipped) -> dict:
    """The row with texts and labels that are not UTF-8 marked as in any manifest: tasks reject them by name."""
    row, marked = dict(row), False
    for column, value in row.items():
        if isinstance(value, str):
            row[column] = _readable(value, mark="")
        elif column in ("text", "labels") and value:
            row[column] = [_readable(v, mark=NOT_UTF8) for v in value]
            marked = marked or row[column] != value
    if marked:
        skipped.keep("a text that is not UTF-8, which no task uses", row["id"])
    return row


def _readable(value: str, *, mark: str) -> str:
    try:
        value.encode()
        return value
    except UnicodeEncodeError:
        # Bytes that were not UTF-8, as ``listing.text_of`` reads them; or half a character, which JSON can spell.
        escaped = all("\udc80" <= c <= "\udcff" for c in value if "\ud800" <= c <= "\udfff")
        raw = value.encode(errors="surrogateescape" if escaped else "surrogatepass")
        return mark + (raw[:_MAX_SHOWN] if mark else raw).decode(errors="backslashreplace")


def write_manifests(
    rows: Iterable[dict], out: Path, skipped: Skipped, *, held_out_share: float
) -> tuple[dict[str, int], list[str]]:
    """({manifest: rows}, columns). Rows without an id and with the id of an earlier row are left out and counted.

    Ids are compared by 64-bit hashes: one false alarm in 10^19 pairs. Memory does not grow with the rows.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    paths = [out, out.with_name(f"{out.stem}-held_out{out.suffix}")][: 2 if held_out_share else 1]
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as drafts:
        writers = [_Writer(path, Path(drafts)) for path in paths]
        for row in rows:
            row = _in_utf8(row, skipped)
            if not row["id"]:
                skipped.add("no id", row["id"])
                continue
            digest = name_key(row["id"])
            # Decided by the id alone, so that a row stays in its part when the data set grows.
            held_out = digest < held_out_share * 2**64
            writers[-1 if held_out else 0].add(row, digest)
        filled = set().union(*(writer.end(skipped) for writer in writers))
        columns = [name for name in SCHEMA.names if name in filled]
        counts = {str(path): writer.num_rows for path, writer in zip(paths, writers, strict=True)}
        if sum(counts.values()):
            for path, writer in zip(paths, writers, strict=True):
                with whole_file(path) as whole:
                    writer.finish(columns, whole)
    return counts, columns
