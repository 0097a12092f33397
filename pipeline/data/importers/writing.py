"""Rows to Parquet manifests: checked, streamed, whole or absent."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.columns import NOT_UTF8
from pipeline.data.importers.listing import Skipped
from pipeline.data.modalities import MEDIA
from pipeline.data.order import name_key
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
# Bytes of a text that is no UTF-8 that are kept, for people to see.
_MOST_SHOWN = 80


class _Writer:
    """One manifest in the making. Columns that no row filled are left out at the end."""

    def __init__(self, path: Path, folder: Path):
        self._folder, self._path = folder, path
        self._writer, self._rows, self.num_rows = pq.ParquetWriter(path, SCHEMA), [], 0
        self.filled: set[str] = set()

    def add(self, row: dict) -> None:
        row = dict(row)
        for column in MEDIA:
            if row.get(column):
                # A path below the manifest's folder as seen from there, so that both can move together.
                row[column] = row[column].removeprefix(f"{self._folder}/")
        self.filled |= {name for name, value in row.items() if value not in (None, [], "")}
        self._rows.append(row)
        self.num_rows += 1
        if len(self._rows) == _ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=SCHEMA))
        self._rows.clear()

    def finish(self, columns: list[str], path: Path) -> None:
        if self._rows:
            self._flush()
        self._writer.close()
        schema = pa.schema([SCHEMA.field(name) for name in columns])
        source = pq.ParquetFile(self._path)
        with pq.ParquetWriter(path, schema) as writer:
            for group in range(source.num_row_groups):
                writer.write_table(source.read_row_group(group, columns=columns).select(columns))


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
        # Bytes that were no UTF-8, as ``listing.text_of`` reads them; or half a character, which JSON can spell.
        escaped = all("\udc80" <= c <= "\udcff" for c in value if "\ud800" <= c <= "\udfff")
        raw = value.encode(errors="surrogateescape" if escaped else "surrogatepass")
        return mark + (raw[:_MOST_SHOWN] if mark else raw).decode(errors="backslashreplace")


def write_manifests(
    rows: Iterable[dict], out: Path, skipped: Skipped, *, held_out_share: float
) -> tuple[dict[str, int], list[str]]:
    """({manifest: rows}, columns). Rows without an id and with the id of an earlier row are left out and counted.

    Ids are told apart by 64 bits of a hash: one false alarm in 10^19 pairs.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    paths = [out, out.with_name(f"{out.stem}-held_out{out.suffix}")][: 2 if held_out_share else 1]
    seen: set[int] = set()
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as drafts:
        writers = [_Writer(Path(drafts) / path.name, out.parent) for path in paths]
        for row in rows:
            row = _in_utf8(row, skipped)
            digest = name_key(row["id"])
            if not row["id"] or digest in seen:
                skipped.add("the id of an earlier row" if row["id"] else "no id", row["id"])
                continue
            seen.add(digest)
            # The id alone decides, so a row stays on its side however the data set grows.
            held_out = digest < held_out_share * 2**64
            writers[-1 if held_out else 0].add(row)
        columns = [name for name in SCHEMA.names if any(name in w.filled for w in writers)]
        counts = {str(path): writer.num_rows for path, writer in zip(paths, writers, strict=True)}
        if sum(counts.values()):
            for path, writer in zip(paths, writers, strict=True):
                with whole_file(path) as whole:
                    writer.finish(columns, whole)
    return counts, columns
