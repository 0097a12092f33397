"""Files that exist whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import RequestError, one_line
from pipeline.store.objects import StoreError
from pipeline.store.path import ObjectPath, user_path

# Suffix of the files that a killed writer leaves behind.
TEMPORARY_SUFFIX = ".partial"


def cache_dir() -> Path:
    """The folder of files that can be rebuilt: $IMP_CACHE, or ``user_cache``."""
    given = os.environ.get("IMP_CACHE")
    return user_path(given) if given else user_cache()


def user_cache() -> Path:
    """~/.cache/imp, or where a container gives its user no home that can be written, a folder of temporary files.

    Raises RequestError if that folder belongs to another user, who could put anything into it.
    """
    home = user_path("~/.cache/imp")
    if home.is_absolute() and _may_be_made(home):
        return home
    folder = Path(tempfile.gettempdir()) / f"imp-cache-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise RequestError(
            f"{home} cannot be written, and {folder} is not of this user alone; let IMP_CACHE name a folder for files "
            "that can be rebuilt"
        )
    return folder


def ensure_home() -> None:
    """Gives libraries a home folder where this user has none, as in a container without a name for its user.

    Ray and others end with an error of their own without one.
    """
    if not os.path.isabs(os.path.expanduser("~")):
        os.environ["HOME"] = str(user_cache())


def _may_be_made(folder: Path) -> bool:
    """Whether this user may write to a folder, or make it."""
    above = next((path for path in (folder, *folder.parents) if os.path.exists(path)), folder)
    return above.is_dir() and os.access(above, os.W_OK | os.X_OK)


@contextlib.contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary path beside ``path``, which it replaces when the block ends; removed if the block raises.

    durable: flush to disk before the replacement, so that a power cut leaves the old file or the new one.
    """
    if isinstance(path, ObjectPath):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / path.name
            path.write_bytes((Path(folder) / path.name).read_bytes())
        return
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
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(path: Path, option: str) -> None:
    """Makes a folder that a user has named by ``option``. Raises RequestError if it cannot be made or written to."""
    if isinstance(path, ObjectPath):
        return reach(path, option)
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as e:
        raise RequestError(
            f"{option} {path}: expected a folder that can be written, found: {one_line(e)}; name another"
        ) from e


def reach(path: Path, option: str) -> None:
    """Asks the store of a run directory that ``option`` names, so that a wrong one is refused at once.

    Raises RequestError without its bucket or access to it, StoreError if it does not answer.
    """
    if isinstance(path, ObjectPath):
        try:
            path.names()
        except StoreError as e:
            if e.refused:
                raise RequestError(f"{option} {path}: {one_line(e)}") from e
            raise


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Writes a file by way of ``whole_file``."""
    with whole_file(path, durable=durable) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file by way of ``whole_file``."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())
