"""A folder of media and texts → a manifest of its files, in memory that does not grow with their number."""

from __future__ import annotations

import itertools
import os
import posixpath
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from pipeline.credentials import redacted
from pipeline.data.importers.listing import ENDINGS, modality_of, text_of
from pipeline.data.media.storage import resolve_filesystem, with_retries
from pipeline.errors import RequestError
from pipeline.files import whole_file

# Files that hold one text each.
_TEXT_ENDING = ".txt"
# Maximum bytes read of a text file; no tokenizer looks further.
_MAX_TEXT_BYTES = 1 << 16
# Names of a folder that are sorted at a time: a folder may have millions.
_SORTED_AT_ONCE = 100_000
_ROWS_AT_ONCE = 10_000
_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("id", "image", "video", "audio")] + [("text", pa.list_(pa.string()))]
)


def write_listing(folder: str, target: Path, *, leave_out: Path) -> dict[str, int]:
    """Writes the manifest of a local folder or of a URI, and returns the number of files of each modality.

    Hidden files and folders are left out, and so is the folder ``leave_out``. Ids are paths below the folder. Raises
    RequestError if no file has an ending that is known.
    """
    counts: dict[str, int] = {}
    rows = _rows(folder, leave_out.resolve())
    with whole_file(target) as temporary, pq.ParquetWriter(temporary, _SCHEMA) as writer:
        while piece := list(itertools.islice(rows, _ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(piece, schema=_SCHEMA))
            for row in piece:
                modality = next(name for name in ("image", "video", "audio", "text") if name in row)
                counts[modality] = counts.get(modality, 0) + 1
    if not counts:
        target.unlink()
        endings = ", ".join(names[0] for names in ENDINGS.values())
        raise RequestError(
            f"--input {redacted(folder)}: expected images, videos, sounds or texts, found none; files are known by "
            f"their endings ({endings}, {_TEXT_ENDING}, ...)"
        )
    return counts


def _rows(folder: str, leave_out: Path) -> Iterator[dict]:
    filesystem, root = resolve_filesystem(folder if "://" in folder else os.path.abspath(folder))
    root, scheme = root.rstrip("/"), folder.split("://", 1)[0] + "://" if "://" in folder else ""
    local = isinstance(filesystem, pyarrow.fs.LocalFileSystem)
    for path in _local_files(root, leave_out) if local else _remote_files(filesystem, root):
        below = path.removeprefix(f"{root}/")
        if path.lower().endswith(_TEXT_ENDING):
            yield {"id": below, "text": [_text(filesystem, path)]}
        elif modality := modality_of(path):
            yield {"id": below, modality: scheme + path}


def _local_files(folder: str, leave_out: Path) -> Iterator[str]:
    """Files below a folder, its own before those of its folders."""
    folders = []
    with os.scandir(folder) as entries:
        while piece := list(itertools.islice(entries, _SORTED_AT_ONCE)):
            for entry in sorted(piece, key=lambda e: e.name):
                if entry.name.startswith(".") or not _is_utf8(entry.name):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.is_file():
                    yield entry.path
    for path in sorted(folders):
        if Path(path).resolve() != leave_out:
            yield from _local_files(path, leave_out)


def _is_utf8(name: str) -> bool:
    """Whether a name can be stored as text."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _remote_files(filesystem: pyarrow.fs.FileSystem, folder: str) -> Iterator[str]:
    selector = pyarrow.fs.FileSelector(folder, recursive=False)
    found = with_retries(folder, lambda: filesystem.get_file_info(selector))
    found = [info for info in found if not posixpath.basename(info.path.rstrip("/")).startswith(".")]
    yield from sorted(info.path for info in found if info.type == pyarrow.fs.FileType.File)
    for path in sorted(info.path for info in found if info.type == pyarrow.fs.FileType.Directory):
        yield from _remote_files(filesystem, path.rstrip("/"))


def _text(filesystem: pyarrow.fs.FileSystem, path: str) -> str:
    def read() -> bytes:
        with filesystem.open_input_stream(path) as stream:
            return stream.read(_MAX_TEXT_BYTES)

    # A character that the limit cuts in two, and bytes that are no UTF-8, are shown as such.
    text = text_of(with_retries(path, read)).encode("utf-8", "replace").decode()
    return " ".join(text.split())
