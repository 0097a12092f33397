"""Files that exist whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import RequestError, one_line

# Suffix of the files that a killed writer leaves behind.
TEMPORARY_SUFFIX = ".partial"


def cache_dir() -> Path:
    """The folder of files that can be rebuilt: $IMP_CACHE, or ~/.cache/imp."""
    return Path(os.environ.get("IMP_CACHE") or "~/.cache/imp").expanduser()


@contextlib.contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary path beside ``path``, which it replaces when the block ends; removed if the block raises.

    durable: flush to disk before the replacement, so that a power cut leaves the old file or the new one.
    """
    path = Path(path)
    # Two processes or threads may write the same file at the same time.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
        if durable:
            with open(temporary, "rb") as f:
                os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(path: Path, option: str) -> None:
    """Makes a folder that a user has named by ``option``. Raises RequestError if it cannot be made or written to."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as e:
        raise RequestError(
            f"{option} {path}: expected a folder that can be written, found: {one_line(e)}; name another"
        ) from e


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Writes a file by way of ``whole_file``."""
    with whole_file(path, durable=durable) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file by way of ``whole_file``."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())
