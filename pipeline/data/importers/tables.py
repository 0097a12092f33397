"""CSV, TSV, JSON or Parquet with columns of any names."""

from __future__ import annotations

import math
import posixpath
from collections.abc import Iterator

from pipeline.data.importers.listing import Skipped, folder_of, text_of
from pipeline.data.importers.records import records
from pipeline.data.modalities import MEDIA
from pipeline.errors import RequestError

# Column → other names it may have, if the table lacks its own name and no option names one.
_ALSO = {"text": ("caption", "captions", "texts"), "labels": ("label", "class", "category")}
# Maximum bytes of a path: a longer binary value is the content of a file.
_MAX_PATH_BYTES = 4096


class _Unreadable(ValueError):
    """A record that cannot be a row. reason: the same for all such records. found: an example."""

    def __init__(self, reason: str, found: object):
        super().__init__(reason)
        self.reason, self.found = reason, found


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
    """FILE.csv, .tsv, .json, .jsonl or .parquet; an option names the column for each of ours.

    folder: base of relative media paths, by default the table's folder. separator: between several captions or labels
    in one cell, by default ";". Without an id column the row's number is its id. Captions may also be in a column
    caption, captions or texts, labels in label, class or category; unused columns are listed at the end.
    """
    asked = {"id": id, "image": image, "video": video, "audio": audio, "text": text, "labels": labels}
    asked |= {"start_s": start_s, "end_s": end_s}
    base = (folder if "://" in folder else posixpath.abspath(folder)) if folder else folder_of(source)
    base = base.rstrip("/")
    found = False
    for number, record in enumerate(records(source, skipped)):
        names = _names(record, asked)
        if not found:
            _check_columns(source, record, names)
            found = True
        for column in record.keys() - names.values():
            if record[column] not in (None, "", []):
                skipped.keep(f"column {column!r} not used, no option names it", str(record[column])[:80])
        row = {"id": f"row-{number:010d}"}
        try:
            row["id"] = _word(record.get(names["id"]), "id") or row["id"]
            row |= _values(record, names, base, separator)
        except _Unreadable as e:
            skipped.add(e.reason, f"{row['id']}: {str(e.found)[:80]}")
            continue
        yield row


def _values(record: dict, names: dict[str, str], base: str, separator: str) -> dict:
    """The row but for its id. Raises _Unreadable."""
    row: dict = {}
    for column in MEDIA:
        path = _path(record.get(names[column]), column)
        if path:
            row[column] = path if "://" in path or path.startswith("/") else f"{base}/{path}"
    for column in ("text", "labels"):
        row[column] = _words(record.get(names[column]), column, separator)
    for column in ("start_s", "end_s"):
        row[column] = _seconds(record.get(names[column]), column)
    return row


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


def _is_missing(value: object) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _word(value: object, column: str) -> str:
    """A single value as text, "" if it is missing. Raises _Unreadable for what holds several."""
    if _is_missing(value):
        return ""
    if isinstance(value, bytes):  # a string to some writers of Parquet
        return text_of(value)
    if isinstance(value, (dict, list, tuple)):
        raise _Unreadable(f"a value of {column} that holds others", value)
    return str(value)


def _path(value: object, column: str) -> str:
    content = value
    if isinstance(value, dict):  # a media file as the datasets library writes it
        value, content = value.get("path"), value.get("bytes")
    is_path = not isinstance(content, bytes) or (
        content is value and len(content) <= _MAX_PATH_BYTES and content.isascii() and b"\0" not in content
    )
    if not is_path:
        raise _Unreadable(f"a file's content in {column}, expected its path; write it to a file", content[:20])
    return _word(value, column)


def _words(value: object, column: str, separator: str) -> list[str]:
    if isinstance(value, (list, tuple)):
        words = [_word(v, column) for v in value]
    else:
        words = _word(value, column).split(separator)
    return [word.strip() for word in words if word.strip()]


def _seconds(value: object, column: str) -> float | None:
    if _is_missing(value):
        return None
    try:
        return float(value)  # pyrefly: ignore[bad-argument-type]
    except (TypeError, ValueError) as e:
        raise _Unreadable(f"a value of {column} that is not a number of seconds", value) from e
