"""CSV, TSV, JSON lines or Parquet with columns of any names."""

from __future__ import annotations

import csv
import io
import itertools
import json
import posixpath
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.importers.listing import Skipped, folder_of, open_file, values_of
from pipeline.data.modalities import MEDIA
from pipeline.errors import RequestError, one_line

# Column → other names it may have, if the table lacks its own name and no option names one.
_ALSO = {"text": ("caption", "captions", "texts"), "labels": ("label", "class", "category")}


def table(
    source: str,
    skipped: Skipped,
    id: str = "id",
    image: str = "image",
    video: str = "video",
    audio: str = "audio",
    text: str = "text",
    labels: str = "labels",
    start_s: str = "start_s",
    end_s: str = "end_s",
    folder: str = "",
    separator: str = ";",
) -> Iterator[dict]:
    """FILE.csv, .tsv, .jsonl or .parquet; an option names the column for each of ours.

    folder: base of relative media paths, by default the table's folder. separator: between several captions or labels
    in one cell, by default ";". Without an id column the row's number is its id. Captions may also be in a column
    caption, captions or texts, labels in label, class or category; unused columns are listed at the end.
    """
    asked = {"id": id, "image": image, "video": video, "audio": audio, "text": text, "labels": labels}
    asked |= {"start_s": start_s, "end_s": end_s}
    base = (folder or folder_of(source)).rstrip("/")
    found = False
    for number, record in enumerate(_records(source)):
        if not isinstance(record, dict):
            skipped.add("a line that is not a JSON object", str(record)[:80])
            continue
        names = _names(record, asked)
        if not found:
            _check_columns(source, record, names)
            found = True
        for column in record.keys() - names.values():
            if record[column] not in (None, "", []):
                skipped.keep(f"column {column!r} not used, no option names it", str(record[column])[:80])
        row = {"id": str(record.get(names["id"]) or f"row-{number:010d}")}
        try:
            for column in MEDIA:
                path = record.get(names[column])
                if path:
                    row[column] = path if "://" in path or path.startswith("/") else f"{base}/{path}"
            for column in ("text", "labels"):
                row[column] = _strings(record.get(names[column]), separator)
            for column in ("start_s", "end_s"):
                value = record.get(names[column])
                row[column] = None if value in (None, "") else float(value)
        except (TypeError, ValueError) as e:
            skipped.add(f"not readable ({e})", row["id"])
            continue
        yield row


def _names(record: dict, asked: dict[str, str]) -> dict[str, str]:
    """Our column → the table's."""
    also = {ours: [n for n in names if n in record] for ours, names in _ALSO.items() if asked[ours] == ours}
    return asked | {ours: names[0] for ours, names in also.items() if names and ours not in record}


def _check_columns(source: str, record: dict, names: dict[str, str]) -> None:
    missing = [f"{ours}={theirs}" for ours, theirs in names.items() if theirs != ours and theirs not in record]
    if missing:
        raise RequestError(f"--option {missing[0]}: {source} has the columns {', '.join(map(str, record))}")
    if not any(names[m] in record for m in (*MEDIA, "text")):
        raise RequestError(
            f"{source}: none of the columns {', '.join(map(str, record))} is named image, video, audio or text; "
            "say which is which, e.g. --option image=path"
        )


def _strings(value, separator: str) -> list[str]:
    if value is None or value == "":
        return []
    values = value if isinstance(value, (list, tuple)) else str(value).split(separator)
    return [str(v).strip() for v in values if str(v).strip()]


def _delimiter(header: str) -> str:
    """A comma, or what a header without one has: spreadsheets write semicolons where the comma is the decimal mark."""
    return next((character for character in ",;\t" if character in header), ",")


def _records(source: str) -> Iterator[dict]:
    ending = posixpath.splitext(source)[1].lower()
    try:
        with open_file(source) as file:
            if ending == ".parquet":
                for batch in pq.ParquetFile(file).iter_batches(batch_size=1024):
                    columns = [values_of(column) for column in batch.columns]
                    yield from (dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True))
            elif ending in (".csv", ".tsv"):
                text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
                header = text.readline()
                delimiter = "\t" if ending == ".tsv" else _delimiter(header)
                yield from csv.DictReader(itertools.chain([header], text), delimiter=delimiter)
            elif ending in (".jsonl", ".ndjson", ".json"):
                for line in io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape"):
                    if line.strip():
                        yield json.loads(line)
            else:
                raise RequestError(f"{source}: expected .csv, .tsv, .jsonl or .parquet")
    except (pa.ArrowInvalid, csv.Error, json.JSONDecodeError) as e:
        raise RequestError(f"{source}: cannot be read as {ending}: {one_line(e, limit=160)}") from e
