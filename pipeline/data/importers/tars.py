"""WebDataset tars and the shards of img2dataset and video2dataset: only headers are read, media stay in place."""

from __future__ import annotations

import json
import posixpath
import tarfile
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.importers.folders import text_lines
from pipeline.data.importers.listing import Folder, Skipped, modality_of, text_of, values_of
from pipeline.data.media.storage import member_path
from pipeline.data.modalities import MEDIA
from pipeline.errors import RequestError

# Maximum bytes of a member, and of one that is a caption.
_MAX_MEMBER_BYTES = 4 << 30
_MAX_TEXT_BYTES = 1 << 20
# Maximum zeros that end a tar.
_END_BYTES = 1 << 20
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
            texts: list[str] = []
            if captions is not None:
                members = {e: m for e, m in members.items() if modality_of(f"x.{e}")}
                texts = captions.get(posixpath.basename(key), [])
                if not texts:
                    skipped.keep("no caption in the table beside its tar", _id(name, key))
            yield from _row(folder.uri(name), _id(name, key), members, file, skipped, texts=texts)


def _tars(folder: Folder) -> list[str]:
    tars = folder.paths(".tar")
    if not tars or not all(t.lower().endswith(".tar") for t in tars):
        raise RequestError(f"{folder.source}: expected .tar files (not compressed: members are read in place)")
    return tars


def _captions(folder: Folder, name: str, column: str) -> dict[str, list[str]]:
    """Key → its captions; a cell may hold several."""
    try:
        with folder.open(name) as file:
            table = pq.read_table(file, columns=["key", column])
    except (pa.ArrowInvalid, KeyError) as e:
        raise RequestError(f"{folder.uri(name)}: expected the columns key and {column}: {str(e)[:120]}") from e
    cells = zip(values_of(table["key"]), values_of(table[column]), strict=True)
    return {str(key): _texts(cell if isinstance(cell, list) else [cell]) for key, cell in cells}


def _texts(values: list) -> list[str]:
    """The values that are texts or numbers and not blank."""
    return [str(v) for v in values if isinstance(v, (str, int)) and str(v).strip()]


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
            if not dot or not base:
                skipped.add("no name before its ending" if dot else "no ending", f"{name}: {path}")
                continue
            mine, ending = posixpath.join(posixpath.dirname(path), base), ending.lower()
            if mine != key and members:
                yield key, members, file
                members = {}
            key = mine
            if ending in members:
                skipped.add("a file whose key and ending another has", f"{name}: {path}")
            else:
                members[ending] = (offset, size)
        if members:
            yield key, members, file


def _members(file, name: str, skipped: Skipped) -> Iterator[tuple[str, int, int]]:
    """(path, offset, size) of the plain files of a tar. A truncated end is counted; members before it are kept."""
    total = file.size()
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                # Without this every header of a tar of millions of members stays in memory.
                tar.members = []
                if member.isdir():
                    continue
                reason = _refused(member, total) or _contradicted(file, member)
                if reason:
                    skipped.add(reason, f"{name}: {member.name[:80]}")
                    _go_on_behind(tar, file, member, total)
                else:
                    yield member.name, member.offset_data, member.size
            if tar.offset >= total:
                skipped.keep("a tar without an end mark, perhaps cut short", name)
            _check_end(file, tar.offset, total)
    except (tarfile.TarError, EOFError, OSError, ValueError) as e:
        skipped.add("a tar that cannot be read to its end", f"{name}: {e}")


def _header_size(file, member: tarfile.TarInfo) -> int:
    """The size in the member's own header, whatever an extended header before it says."""
    file.seek(member.offset_data - tarfile.BLOCKSIZE)
    return tarfile.nti(file.read(tarfile.BLOCKSIZE)[124:136])


def _contradicted(file, member: tarfile.TarInfo) -> str | None:
    # An extended header has a size only if the member's own has no room for it.
    if "size" in member.pax_headers and member.size != _header_size(file, member):
        return "a size that its two headers disagree about"
    return None


def _go_on_behind(tar: tarfile.TarFile, file, member: tarfile.TarInfo, total: int) -> None:
    """Moves past a member whose extended header may give a wrong size."""
    if member.size < 0 and "size" not in member.pax_headers:
        raise tarfile.ReadError(f"{member.name[:80]} has a size of {member.size} bytes")
    if "size" in member.pax_headers and member.isreg():
        size, fits = _header_size(file, member), 0 <= member.size <= total - member.offset_data
        if size > 0 or not fits:  # of members beyond 8 GiB the plain header says nothing
            tar.offset = member.offset_data + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _check_end(file, offset: int, total: int) -> None:
    """Raises ReadError if data follow the place where reading ended without an error."""
    if offset < total:
        file.seek(offset)
        if file.read(_END_BYTES).strip(b"\0"):
            raise tarfile.ReadError(f"no header at byte {offset} of {total}, and the rest is not read")


def _refused(member: tarfile.TarInfo, total: int) -> str | None:
    if not member.isreg() or member.issparse():
        return "not a plain file"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "a name that leaves the tar"
    if member.size < 0:
        return "a negative size"
    if member.size > _MAX_MEMBER_BYTES:
        return "larger than any sample"
    if member.offset_data + member.size > total:
        return "cut short"
    return None


def _row(
    tar: str, sample_id: str, members: dict[str, tuple[int, int]], file, skipped: Skipped, *, texts: Sequence[str] = ()
) -> Iterator[dict]:
    row = {"id": sample_id}
    for ending, (offset, size) in members.items():
        modality = modality_of(f"x.{ending.rpartition('.')[2]}")
        if modality in row:
            skipped.keep(f"a sample with a second {modality}, which is not used", f"{sample_id}.{ending}")
        elif modality:
            row[modality] = member_path(tar, offset, size)
    if not row.keys() & set(MEDIA):
        skipped.add("no media", row["id"])
        return
    captions, labels = list(texts), []
    for ending in ("txt", "cls", "json"):
        content = _sidecar(file, f"{sample_id}.{ending}", members.get(ending, (0, 0)), skipped)
        if ending == "json" and content:
            more_captions, more_labels = _from_json(content, f"{sample_id}.json", skipped)
            captions, labels = captions or more_captions, labels or more_labels
        elif ending == "txt":
            captions += text_lines(content)
        else:
            labels += text_lines(content)
    yield row | {"text": captions, "labels": labels}


def _sidecar(file, path: str, place: tuple[int, int], skipped: Skipped) -> bytes:
    offset, size = place
    if size > _MAX_TEXT_BYTES:
        skipped.keep("a text file too large to be a caption", path)
        return b""
    file.seek(offset)
    return file.read(size)


def _from_json(content: bytes, path: str, skipped: Skipped) -> tuple[list[str], list[str]]:
    try:
        data = json.loads(text_of(content))
        if not isinstance(data, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError):
        skipped.keep("a .json that cannot be read", path)
        return [], []
    found = []
    for keys in (_CAPTION_KEYS, _LABEL_KEYS):
        value = next((data[k] for k in keys if data.get(k) not in (None, "", [])), [])
        values = value if isinstance(value, list) else [value]
        found.append(_texts(values))
    return found[0], found[1]
