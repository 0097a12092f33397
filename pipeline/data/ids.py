"""Ids and media paths of whole manifests against each other, by 64-bit hashes: no loop over rows, bounded memory."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.columns import values
from pipeline.data.manifest import Manifest
from pipeline.data.modalities import MEDIA
from pipeline.data.order import mix
from pipeline.data.repeated import Repeated
from pipeline.errors import RequestError, one_line
from pipeline.files import cache_dir

# Maximum rows that are checked; from a larger manifest, evenly spread pieces.
MAX_ROWS = 1 << 26
# Maximum held-out rows that are compared with the training rows.
_MAX_HELD_OUT = 1 << 22
# In a path: slashes with nothing between them; a folder and the step back out of it, and the most of those.
_REPEATED_SLASH = r"/(\./|/)+"
_STEP_BACK, _MAX_STEPS_BACK = r"/([^/.][^/]*|\.[^/.][^/]*|\.\.[^/]+)/\.\./", 8
# Maximum bytes of a text that is hashed together with others of its length.
_SHORT = 512


@dataclasses.dataclass(frozen=True)
class Repeats:
    """Ids of several rows. rows: number of these rows, among ``looked_at`` compared ones. example: (id, its rows)."""

    looked_at: int = 0
    ids: int = 0
    rows: int = 0
    example: tuple[str, int] | None = None


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Held-out rows, of ``rows``, that share their id or a media file with a training row."""

    rows: int
    ids: int
    media: int


def hashes(column: pa.Array) -> np.ndarray:
    """(n,) uint64 of a column of strings: equal for equal bytes; null counts as empty."""
    column = column.fill_null("").cast(pa.large_binary())
    offsets = np.frombuffer(column.buffers()[1], np.int64)[column.offset : column.offset + len(column) + 1]
    data = np.frombuffer(column.buffers()[2] or b"", np.uint8)
    lengths, out = np.diff(offsets), np.empty(len(column), np.uint64)
    order = np.argsort(lengths, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1) if len(order) else ():
        length = int(lengths[rows[0]])
        if length > _SHORT:
            out[rows] = [_digest(data[start : start + length]) for start in offsets[rows]]
            continue
        words = np.zeros((len(rows), -(-length // 8) * 8), np.uint8)
        if length:
            words[:, :length] = data[offsets[rows, None] + np.arange(length)]
        out[rows] = mix(length, *words.view(np.uint64).T)
    return out


def _digest(data: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def repeats(manifest: Manifest) -> Repeats:
    """Ids of several rows. Large manifests are checked in parts; one full of repeats is not read to its end.

    Raises RequestError if the hashes of more ids than fit into memory find no room in the cache.
    """
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="ids-") as folder:
            return _repeats(manifest, Repeated(Path(folder)))
    except OSError as e:
        raise RequestError(
            f"manifest {manifest.uri}: its ids cannot be compared in {cache_dir()}: {one_line(e)}; free some space, or "
            "set IMP_CACHE to another folder"
        ) from e


def _repeats(manifest: Manifest, found: Repeated) -> Repeats:
    for batch in manifest.batches(("id",), max_rows=MAX_ROWS):
        found.add(hashes(batch.column(0)))
        if found.any_in_a_piece:
            break
    num_ids, num_rows, example = 0, 0, None
    for entries in found.entries():
        several = entries[entries["count"] > 1]
        num_ids, num_rows = num_ids + len(several), num_rows + int(several["count"].sum())
        if example is None and len(several):
            example = several[0]
    if example is None:
        return Repeats(found.num_hashes)
    return Repeats(found.num_hashes, num_ids, num_rows, (_id_of(manifest, example["hash"]), int(example["count"])))


def _id_of(manifest: Manifest, wanted: np.uint64) -> str:
    ids = (batch.column(0) for batch in manifest.batches(("id",), max_rows=MAX_ROWS))
    places = ((column, np.flatnonzero(hashes(column) == wanted)) for column in ids)
    return next(values(column.slice(int(found[0]), 1), "id")[0] for column, found in places if len(found))


def overlap(manifest: Manifest, held_out: Manifest) -> Overlap:
    """Counts the held-out rows that are training rows too."""
    media = [c for c in (*MEDIA, *manifest.media) if c in manifest.columns and c in held_out.columns]
    columns = ("id", *media)
    theirs = {c: [] for c in columns}
    for part in _hashed(held_out, columns, max_rows=_MAX_HELD_OUT):
        for name, found in part.items():
            theirs[name].append(found)
    theirs = {name: np.concatenate(found) for name, found in theirs.items()}
    known = {name: np.unique(found) for name, found in theirs.items()}
    seen = {name: np.zeros(len(found), bool) for name, found in known.items()}
    for part in _hashed(manifest, columns, max_rows=MAX_ROWS):
        for name, found in part.items():
            places = np.searchsorted(known[name], found).clip(max=len(known[name]) - 1)
            seen[name][places[known[name][places] == found]] = True
    both = {name: np.isin(theirs[name], known[name][seen[name]]) for name in columns}
    nothing = hashes(pa.array([""]))
    files = np.zeros(len(theirs["id"]), bool)
    for name in media:
        files |= both[name] & (theirs[name] != nothing)
    return Overlap(len(files), int(both["id"].sum()), int(files.sum()))


def _hashed(manifest: Manifest, columns: tuple[str, ...], *, max_rows: int) -> Iterator[dict[str, np.ndarray]]:
    """Hashes of the columns; paths are resolved first."""
    for batch in manifest.batches(columns, max_rows=max_rows):
        yield {
            name: hashes(batch.column(name) if name == "id" else resolved(manifest, batch.column(name)))
            for name in columns
        }


def resolved(manifest: Manifest, paths: pa.Array) -> pa.Array:
    """``manifest.resolve`` of every path; null and empty ones stay empty."""
    paths = paths.fill_null("").cast(pa.large_binary())
    folder, nothing = (
        pa.scalar(text.encode(), pa.large_binary()) for text in (manifest.resolve("x").removesuffix("x"), "")
    )
    whole = pc.or_(pc.match_substring(paths, "://"), pc.or_(pc.starts_with(paths, "/"), pc.equal(paths, b"")))
    return _normal(pc.if_else(whole, paths, pc.binary_join_element_wise(folder, paths, nothing)))


def _normal(paths: pa.Array) -> pa.Array:
    """Local paths without repeated slashes and steps back, in which names of one file may differ."""
    odd = pc.or_(pc.match_substring(paths, "/."), pc.match_substring(paths, "//"))
    local = pc.and_(odd, pc.invert(pc.match_substring(paths, "://")))
    if not pc.any(local).as_py():
        return paths
    plain = pc.replace_substring_regex(paths.filter(local), _REPEATED_SLASH, "/")
    for _ in range(_MAX_STEPS_BACK):
        if not pc.any(pc.match_substring(plain, "/../")).as_py():
            break
        plain = pc.replace_substring_regex(plain, _STEP_BACK, "/")
    return pc.replace_with_mask(paths, local, plain)
