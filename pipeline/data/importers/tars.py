"""WebDataset tars and the shards of img2dataset and video2dataset: only headers are read, media stay where they are."""

from __future__ import annotations

import io
import json
import posixpath
import tarfile
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.importers.folders import text_lines
from pipeline.data.importers.listing import Folder, Skipped, modality_of
from pipeline.data.media.storage import member_path
from pipeline.errors import RequestError

# A member that claims more is refused: no single image, clip or caption is as large.
_MOST_MEMBER_BYTES = 4 << 30
_MOST_TEXT_BYTES = 1 << 20
_CAPTION_KEYS, _LABEL_KEYS = ("caption", "captions", "text"), ("label", "labels", "class_name", "cls")


def webdataset(source: str, skipped: Skipped) -> Iterator[dict]:
    """Tars whose members share a key: KEY.jpg, KEY.mp4, KEY.wav, KEY.txt, KEY.cls, KEY.json."""
    folder = Folder(source)
    for name in _tars(folder):
        for key, members, file in _samples(folder, name, skipped):
            yield from _row(folder.uri(name), _id(name, key), members, file, skipped)


def img2dataset(source: str, skipped: Skipped, caption: str = "caption") -> Iterator[dict]:
    """Shards of img2dataset or video2dataset: NNNNN.tar, and NNNNN.parquet with the columns key and CAPTION."""
    folder = Folder(source)
    for name in _tars(folder):
        beside = posixpath.splitext(name)[0] + ".parquet"
        captions = _captions(folder, beside, caption) if folder.has(beside) else None
        for key, members, file in _samples(folder, name, skipped):
            text = None
            if captions is not None:
                members = {e: m for e, m in members.items() if modality_of(f"x.{e}")}
                text = captions.get(posixpath.basename(key))
            yield from _row(folder.uri(name), _id(name, key), members, file, skipped, text=text)


def _tars(folder: Folder) -> list[str]:
    tars = folder.paths(".tar")
    if not tars or not all(t.lower().endswith(".tar") for t in tars):
        raise RequestError(f"{folder.source}: expected .tar files (not compressed: members are read where they lie)")
    return tars


def _captions(folder: Folder, name: str, column: str) -> dict[str, str]:
    try:
        with folder.open(name) as file:
            table = pq.read_table(file, columns=["key", column])
    except (pa.ArrowInvalid, KeyError) as e:
        raise RequestError(f"{folder.uri(name)}: expected the columns key and {column}: {str(e)[:120]}") from e
    return dict(zip(table["key"].to_pylist(), table[column].to_pylist(), strict=True))


def _id(name: str, key: str) -> str:
    """Keys are unique in a tar, not among tars."""
    return f"{posixpath.splitext(name)[0]}/{key}"


def _samples(folder: Folder, name: str, skipped: Skipped) -> Iterator[tuple[str, dict[str, tuple[int, int]], object]]:
    """(key, {ending: (offset, size)}, the open tar) of neighbouring members with one key.

    The key is all of a path up to the first dot of the file's name.
    """
    with folder.open(name) as file:
        key, members = None, {}
        for path, offset, size in _members(file, name, skipped):
            base, dot, ending = posixpath.basename(path).partition(".")
            if not dot:
                skipped.add("no ending", f"{name}: {path}")
                continue
            mine = posixpath.join(posixpath.dirname(path), base)
            if mine != key and members:
                yield key, members, file
                members = {}
            key = mine
            members[ending.lower()] = (offset, size)
        if members:
            yield key, members, file


def _members(file, name: str, skipped: Skipped) -> Iterator[tuple[str, int, int]]:
    """(path, offset of its bytes, size) of the plain files of a tar; a torn end is counted, what came before stays."""
    total = file.size()
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                # Without this every header of a tar of millions of members stays in memory.
                tar.members = []
                if member.isdir():
                    continue
                reason = _refused(member, total)
                if reason:
                    skipped.add(reason, f"{name}: {member.name[:80]}")
                else:
                    yield member.name, member.offset_data, member.size
    except (tarfile.TarError, EOFError, OSError, ValueError) as e:
        skipped.add("a tar that cannot be read to its end", f"{name}: {e}")


def _refused(member: tarfile.TarInfo, total: int) -> str | None:
    if not member.isreg() or member.issparse():
        return "not a plain file"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "a name that leaves the tar"
    if member.size > _MOST_MEMBER_BYTES:
        return "larger than any sample"
    if member.offset_data + member.size > total:
        return "cut short"
    return None


def _row(
    tar: str, sample_id: str, members: dict[str, tuple[int, int]], file, skipped: Skipped, *, text: str | None = None
) -> Iterator[dict]:
    row = {"id": sample_id}
    for ending, (offset, size) in members.items():
        modality = modality_of(f"x.{ending.rpartition('.')[2]}")
        if modality and modality not in row:
            row[modality] = member_path(tar, offset, size)
    if not row.keys() & {"image", "video", "audio"}:
        skipped.add("no media", row["id"])
        return
    captions, labels = [text] if text else [], []
    for ending in ("txt", "cls", "json"):
        offset, size = members.get(ending, (0, 0))
        if not 0 < size <= _MOST_TEXT_BYTES:
            continue
        file.seek(offset)
        content = file.read(size)
        if ending == "json":
            more_captions, more_labels = _from_json(content)
            captions, labels = captions or more_captions, labels or more_labels
        elif ending == "txt":
            captions += text_lines(content)
        else:
            labels += text_lines(content)
    yield row | {"text": captions, "labels": labels}


def _from_json(content: bytes) -> tuple[list[str], list[str]]:
    try:
        data = json.load(io.BytesIO(content))
    except ValueError:
        return [], []
    if not isinstance(data, dict):
        return [], []
    found = []
    for keys in (_CAPTION_KEYS, _LABEL_KEYS):
        value = next((data[k] for k in keys if data.get(k) not in (None, "", [])), [])
        values = value if isinstance(value, list) else [value]
        found.append([str(v) for v in values if isinstance(v, (str, int)) and str(v).strip()])
    return found[0], found[1]
