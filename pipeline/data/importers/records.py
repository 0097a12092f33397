"""The records of a table file, one after another: CSV, TSV, JSON or Parquet."""

from __future__ import annotations

import csv
import io
import itertools
import json
import posixpath
from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.importers.listing import Skipped, open_file, values_of
from pipeline.errors import RequestError, one_line

# Maximum characters of one cell of a CSV: far beyond a caption, below what would exhaust the memory.
_MAX_CELL = 64 << 20
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
# The key of cells beyond the last column of the header.
_BEYOND = "(beyond the header)"


def records(source: str, skipped: Skipped) -> Iterator[dict]:
    """Column → value of each record. Lines that are no JSON object are counted.

    Raises RequestError for a file of another kind, one that is damaged, or one with two columns of one name.
    """
    ending = posixpath.splitext(source)[1].lower()
    try:
        with open_file(source) as file:
            if ending == ".parquet":
                yield from _of_parquet(file, source)
            elif ending in (".csv", ".tsv"):
                yield from _of_csv(_text(file), source, tabs=ending == ".tsv")
            elif ending in (".jsonl", ".ndjson", ".json"):
                yield from _of_json(_text(file), skipped)
            else:
                raise RequestError(f"{source}: expected .csv, .tsv, .json, .jsonl or .parquet")
    except (pa.ArrowInvalid, csv.Error, json.JSONDecodeError, UnicodeError) as e:
        raise RequestError(f"{source}: cannot be read as {ending}: {one_line(e, limit=160)}") from e


def _text(file: BinaryIO) -> io.TextIOWrapper:
    """Bytes that are not UTF-8 become lone surrogates. Spreadsheets also write UTF-16, with a mark before it."""
    encoding = "utf-16" if file.read(2) in _UTF16 else "utf-8-sig"
    file.seek(0)
    return io.TextIOWrapper(file, encoding=encoding, errors="surrogateescape", newline="")


def _of_parquet(file: pa.NativeFile, source: str) -> Iterator[dict]:
    table = pq.ParquetFile(file)
    _check_names(table.schema_arrow.names, source)
    for batch in table.iter_batches(batch_size=1024):
        columns = [values_of(column) for column in batch.columns]
        yield from (dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True))


def _of_csv(text: io.TextIOWrapper, source: str, *, tabs: bool) -> Iterator[dict]:
    csv.field_size_limit(_MAX_CELL)
    header = text.readline()
    delimiter = "\t" if tabs else _delimiter(header)
    rows = csv.DictReader(itertools.chain([header], text), delimiter=delimiter, restkey=_BEYOND)
    _check_names(rows.fieldnames or (), source)
    yield from rows


def _delimiter(header: str) -> str:
    """A comma, or what a header without one has: spreadsheets write semicolons where the comma is the decimal mark."""
    return next((character for character in ",;\t" if character in header), ",")


def _of_json(text: io.TextIOWrapper, skipped: Skipped) -> Iterator[dict]:
    """The objects of JSON lines, or of one array."""
    first = next((line for line in text if line.strip()), "")
    if first.lstrip().startswith("["):
        found = enumerate(json.loads(first + text.read()), 1)
    else:
        found = ((number, _line(line)) for number, line in enumerate(itertools.chain([first], text), 1) if line.strip())
    for number, record in found:
        if isinstance(record, dict):
            yield record
        else:
            skipped.add("not a JSON object", f"record {number}: {str(record)[:80]}")


def _line(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line.strip()


def _check_names(names: list[str] | tuple, source: str) -> None:
    """Raises RequestError if two columns have one name: only one of them could be read."""
    for name in names:
        if name and list(names).count(name) > 1:
            raise RequestError(
                f"{source}: expected columns of different names, found {name!r} more than once; rename one"
            )
