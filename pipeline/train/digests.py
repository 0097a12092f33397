"""Digests of files and of JSON, to find changes since they were written."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import re
from pathlib import Path

from pipeline.files import sha256_of
from pipeline.store.path import ObjectPath

# Maximum number of files read in parallel: more gain nothing, and training goes on beside them.
_MAX_THREADS = 8
_SEAL = re.compile(rb', "sha256": "([0-9a-f]{64})"\}\Z')


def file_digests(folder: Path) -> dict[str, dict]:
    """Name → {"bytes", "sha256"} of every file in a folder."""
    names = sorted(_files(folder))
    with concurrent.futures.ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: _digest(folder / name), names), strict=True))


def _digest(path: Path) -> dict:
    if isinstance(path, ObjectPath):
        return digest_of(path.read_bytes())
    return {"bytes": path.lstat().st_size, "sha256": sha256_of(path)}


def digest_of(content: bytes) -> dict:
    """The size and digest of a file's content."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def cut_file(folder: Path, files: dict[str, dict]) -> str | None:
    """The first of ``files`` that is missing or has another size, in words; reads no file.

    In a bucket a file is whole or missing, and listings have no sizes.
    """
    if isinstance(folder, ObjectPath):
        found = set(folder.names())
        return next((f"{name} is missing" for name in files if name not in found), None)
    for name, written in files.items():
        try:
            found = (folder / name).lstat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        if found != written["bytes"]:
            return f"{name} has {found} bytes, {written['bytes']} were written"
    return None


def changed_file(folder: Path, files: dict[str, dict], *, besides: str) -> str | None:
    """The first file that changed, is missing or does not belong, in words; reads every byte.

    besides: the file that holds ``files``, which has a digest of itself.
    """
    if cut := cut_file(folder, files):
        return cut
    found = file_digests(folder)
    for name in sorted(found):
        if name in files and found[name] != files[name]:
            return f"{name} is corrupt (checksum mismatch)"
        # Hidden files are the system's, and never read.
        if name not in files and name != besides and "/." not in f"/{name}":
            return f"{name} does not belong to it"
    return None


def sealed(value: dict) -> bytes:
    """A dict as JSON that ends with a digest of itself."""
    body = json.dumps(value).encode()
    return body[:-1] + f', "sha256": "{hashlib.sha256(body).hexdigest()}"}}'.encode()


def read_sealed(path: Path) -> tuple[dict, bool | None]:
    """(the dict, whether it is unchanged since ``sealed``: None if it has no digest).

    Raises ValueError if the file is not a JSON object.
    """
    raw = path.read_bytes()
    seal = _SEAL.search(raw)
    body = raw[: seal.start()] + b"}" if seal else raw
    value = json.loads(body)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return value, seal and hashlib.sha256(body).hexdigest().encode() == seal[1]


def _files(folder: Path) -> set[str]:
    if isinstance(folder, ObjectPath):
        return set(folder.names())
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
