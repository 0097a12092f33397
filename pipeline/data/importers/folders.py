"""Folders of media files: classes as folder names, or captions in text files beside them."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator

from pipeline.data.importers.listing import Folder, Skipped, modality_of, text_of


def class_folders(source: str, skipped: Skipped) -> Iterator[dict]:
    """CLASS/FILE: the folder directly above a media file is its label."""
    folder = Folder(source)
    for path in folder.paths():
        modality, above = modality_of(path), posixpath.basename(posixpath.dirname(path))
        if _is_hidden(path):
            skipped.add("a hidden file", path)
        elif modality is None:
            skipped.add("not a media file", path)
        elif not above:
            skipped.add("not in a class folder", path)
        else:
            yield {"id": path, modality: folder.uri(path), "labels": [above]}


def _is_hidden(path: str) -> bool:
    """Whether a file, or a folder above it, is a tool's own: macOS writes ._cat.jpg, Jupyter .ipynb_checkpoints."""
    return "/." in f"/{path}"


def sidecar_text(source: str, skipped: Skipped) -> Iterator[dict]:
    """FILE and FILE.txt (or the same name ending in .txt): each line of the text is a caption."""
    folder = Folder(source)
    paths = folder.paths()
    known = set(paths)
    for path in paths:
        modality = modality_of(path)
        if modality is None or _is_hidden(path):
            # A hidden folder may be the manifest's own draft.
            if not path.endswith(".txt") and not _is_hidden(path):
                skipped.add("not a media file", path)
            continue
        beside = [name for name in (posixpath.splitext(path)[0] + ".txt", path + ".txt") if name in known]
        captions = text_lines(folder.read(beside[0])) if beside else []
        if captions:
            yield {"id": path, modality: folder.uri(path), "text": captions}
        else:
            skipped.add("no caption beside it", path)


def text_lines(content: bytes) -> list[str]:
    """The lines that are not blank."""
    return [line.strip() for line in text_of(content).splitlines() if line.strip()]
