"""Files below a folder on any file system, and counts of the rows that an import leaves out."""

from __future__ import annotations

import posixpath

import pyarrow as pa
import pyarrow.fs

from pipeline.data.media.storage import resolve_filesystem
from pipeline.errors import RequestError

ENDINGS = {
    "image": (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm"),
    "video": (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp", ".ogv"),
    "audio": (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".m4a", ".aac", ".wma"),
}
# Maximum number of reasons that are counted apart: records may have columns of any number of names.
_MAX_REASONS = 30
_MODALITY = {ending: modality for modality, endings in ENDINGS.items() for ending in endings}


def modality_of(name: str) -> str | None:
    """image, video or audio by a file's ending."""
    return _MODALITY.get(posixpath.splitext(name)[1].lower())


class Skipped:
    """Counts rows and files left out (``reasons``) and defects of rows that are kept (``kept``).

    Both are reason → (count, an example).
    """

    def __init__(self):
        self.reasons: dict[str, tuple[int, str]] = {}
        self.kept: dict[str, tuple[int, str]] = {}

    def add(self, reason: str, example: str, *, count: int = 1) -> None:
        """Counts rows or files that are left out."""
        _count(self.reasons, reason, example, count)

    def keep(self, reason: str, example: str) -> None:
        """Counts a defect of a row that is kept."""
        _count(self.kept, reason, example, 1)


def _count(counts: dict[str, tuple[int, str]], reason: str, example: str, more: int) -> None:
    if reason not in counts and len(counts) >= _MAX_REASONS:
        reason, example = "for other reasons", f"{reason}: {example}"
    count, first = counts.get(reason, (0, example))
    counts[reason] = (count + more, first)


class Folder:
    """The files below a folder, or one file of it (``file``). Raises RequestError if nothing is found."""

    def __init__(self, source: str):
        self.source = source
        self.filesystem, self.root = resolve_filesystem(source if "://" in source else posixpath.abspath(source))
        self._scheme = source.split("://", 1)[0] + "://" if "://" in source else ""
        kind = self.filesystem.get_file_info(self.root).type
        if kind == pyarrow.fs.FileType.NotFound:
            raise RequestError(f"{source}: expected a file or a folder, found nothing there")
        self.file = None
        if kind == pyarrow.fs.FileType.File:
            self.root, self.file = posixpath.split(self.root)
        self.root = self.root.rstrip("/")

    def paths(self, *endings: str) -> list[str]:
        """Sorted paths, relative to the folder, of the files with one of the endings (any case); all without one."""
        if self.file:
            return [self.file]
        selector = pyarrow.fs.FileSelector(self.root, recursive=True)
        files = (i.path for i in self.filesystem.get_file_info(selector) if i.type == pyarrow.fs.FileType.File)
        found = sorted(path.removeprefix(f"{self.root}/") for path in files)
        return [path for path in found if not endings or path.lower().endswith(endings)]

    def uri(self, path: str) -> str:
        """A manifest's path or URI for a relative path."""
        return f"{self._scheme}{self.root}/{path}"

    def has(self, path: str) -> bool:
        return self.filesystem.get_file_info(f"{self.root}/{path}").type == pyarrow.fs.FileType.File

    def open(self, path: str) -> pyarrow.NativeFile:
        """The file, open for random access."""
        return self.filesystem.open_input_file(f"{self.root}/{path}")

    def read(self, path: str) -> bytes:
        with self.open(path) as file:
            return file.read()


def open_file(source: str) -> pyarrow.NativeFile:
    """A single open file. Raises RequestError if there is none."""
    folder = Folder(source)
    if not folder.file:
        raise RequestError(f"{source}: expected a file, found a folder")
    return folder.open(folder.file)


def read_file(source: str) -> bytes:
    """The content of a single file. Raises RequestError if there is none."""
    with open_file(source) as file:
        return file.read()


def text_of(content: bytes) -> str:
    """Decodes UTF-8; other bytes become lone surrogates, which ``writing`` recognises."""
    return content.decode("utf-8-sig", errors="surrogateescape")


def values_of(column: pa.Array | pa.ChunkedArray) -> list:
    """``to_pylist`` for strings that may not be UTF-8: they are decoded by ``text_of``."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        kind = pa.large_binary() if pa.types.is_string(column.type) or pa.types.is_large_string(column.type) else None
        return [_text(value) for value in column.cast(kind or pa.large_list(pa.large_binary())).to_pylist()]


def _text(value: bytes | list | None) -> str | list | None:
    return [_text(v) for v in value] if isinstance(value, list) else value and text_of(value)


def folder_of(source: str) -> str:
    """The folder in which a file lies, as a path or URI."""
    return posixpath.dirname(source if "://" in source else posixpath.abspath(source))


def by_stem(folder: Folder, modality: str, skipped: Skipped) -> dict[str, str]:
    """File name without its ending → URI, of all files of a modality; the first in sorted order if two agree."""
    found: dict[str, str] = {}
    for path in folder.paths(*ENDINGS[modality]):
        stem = posixpath.splitext(posixpath.basename(path))[0]
        if stem in found:
            skipped.add("a second file of one name", path)
        else:
            found[stem] = folder.uri(path)
    return found
