"""Paths in a bucket that behave as ``pathlib`` paths do, as far as a run needs it."""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import io
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PosixPath
from typing import IO, Any

from pipeline.errors import RequestError
from pipeline.store.objects import SCHEMES, ObjectStore, open_store

_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", re.ASCII)
# A run's keys hold neither what a URI's other parts begin with nor what is not shown.
_ODD = re.compile(r"[?#\x00-\x1f\x7f\\]|(?:^|/)\.\.?(?:/|$)")
# Suffix of logs, each kept as one object a segment below its name.
LOG_SUFFIX = ".jsonl"


class ObjectPath(PosixPath):
    """A file or folder in a bucket. Folders exist while they hold something; what is written is whole or not there.

    A log (``LOG_SUFFIX``) is the concatenation of its segments.
    """

    @property
    def store(self) -> ObjectStore:
        """The bucket."""
        return open_store(self.parts[0].removesuffix(":"), self.parts[1])

    @property
    def key(self) -> str:
        """The name in the bucket."""
        return "/".join(self.parts[2:])

    def __str__(self) -> str:
        return f"{self.parts[0]}//{'/'.join(self.parts[1:])}"

    def __fspath__(self) -> str:
        return str(self)

    def absolute(self) -> ObjectPath:
        return self

    def resolve(self, strict: bool = False) -> ObjectPath:
        return self

    def names(self) -> list[str]:
        """The keys of all files below, relative to here, sorted; without the markers that tools put for folders."""
        prefix = f"{self.key}/"
        return [name[len(prefix) :] for name in self.store.names(prefix) if not name.endswith("/")]

    @property
    def _is_log(self) -> bool:
        return self.suffix == LOG_SUFFIX

    def segments(self) -> list[str]:
        """The keys of a log's segments in order."""
        return [f"{self.key}/{name}" for name in self.names()] if self._is_log else []

    def exists(self, **_: Any) -> bool:
        return any(name == self.key or name.startswith(f"{self.key}/") for name in self.store.names(self.key))

    def is_file(self, **_: Any) -> bool:
        return self.exists() if self._is_log else self.key in self.store.names(self.key)

    def is_dir(self, **_: Any) -> bool:
        return not self._is_log and bool(self.names())

    def is_symlink(self) -> bool:
        return False

    def iterdir(self) -> Iterator[ObjectPath]:
        for name in dict.fromkeys(name.partition("/")[0] for name in self.names()):
            yield self / name

    def glob(self, pattern: str, **_: Any) -> Iterator[ObjectPath]:
        """The files and folders here whose names match."""
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def read_bytes(self) -> bytes:
        if self._is_log:
            with self.open("rb") as file:
                return file.read()
        content = self.store.get(self.key)
        if content is None:
            raise FileNotFoundError(f"{self} is missing")
        return content

    def read_text(self, encoding: str | None = None, errors: str | None = None, **_: Any) -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def open(self, mode: str = "r", *args: Any, **kwargs: Any) -> IO[Any]:
        """Opens a local copy to read, which goes when it is closed."""
        if mode not in ("r", "rb"):
            raise io.UnsupportedOperation(f"{self}: objects are written whole")
        copy = tempfile.TemporaryFile()
        with contextlib.ExitStack() as failed:
            failed.callback(copy.close)
            if self._is_log:
                keys = self.segments()
                if not keys:
                    raise FileNotFoundError(f"{self} is missing")
                for content in self.store.get_many(keys):
                    copy.write(content)
            else:
                copy.write(self.read_bytes())
            failed.pop_all()
        copy.seek(0)
        kwargs.pop("buffering", None)
        return copy if "b" in mode else io.TextIOWrapper(copy, **{"encoding": "utf-8"} | kwargs)

    def write_bytes(self, data: Any) -> int:
        self.store.put(self.key, bytes(data))
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None, **_: Any) -> int:
        return self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder exists while it holds something."""

    def unlink(self, missing_ok: bool = False) -> None:
        if self._is_log:
            # Backwards: what a kill leaves is a log that ends earlier.
            for key in reversed(self.segments()):
                self.store.delete([key])
        else:
            self.store.delete([self.key])

    def rename(self, target: Any) -> Any:
        """Moves a folder file by file."""
        for name in self.names():
            (target / name).write_bytes((self / name).read_bytes())
        self.remove_all()
        return target

    def remove_all(self) -> None:
        """Removes all files below."""
        self.store.delete(self.store.names(f"{self.key}/"))


def user_path(text: str | Path) -> Path:
    """A path as a user writes it: ~ is a home folder. It stays as it is where nobody knows that folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def run_path(text: str | Path, *, option: str = "--run-dir") -> Path:
    """The path of a run directory: in a bucket for s3:// and gs://, else on this machine's file systems.

    option: of the command, for the RequestError about any other scheme.
    """
    if isinstance(text, Path):
        return text
    scheme, is_uri, rest = text.partition("://")
    if not is_uri:
        return user_path(text)
    if scheme not in SCHEMES:
        raise RequestError(
            f"{option} {text}: expected a folder, s3://BUCKET/PATH or gs://BUCKET/PATH, found the scheme {scheme}"
        )
    bucket, _, key = rest.partition("/")
    if "@" in bucket or ":" in bucket:
        raise RequestError(
            f"{option} {scheme}://…: credentials never belong in a URI; give them by the environment or the files of "
            "the provider's tools"
        )
    if not _BUCKET.fullmatch(bucket) or not key.strip("/") or _ODD.search(key):
        raise RequestError(f"{option} {text}: expected {scheme}://BUCKET/PATH, with a path of plain names below it")
    return ObjectPath(f"{scheme}://{bucket}/{key}")


def local_folder(path: Path, cache: Path) -> Path:
    """The folder on this machine for files that libraries write: the run directory, or one in ``cache``."""
    if not isinstance(path, ObjectPath):
        return path
    name = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    return cache / "stores" / name


def publish(folder: Path, target: Path) -> None:
    """Puts the files of a folder of this machine into the run directory, if that is in a bucket."""
    if isinstance(target, ObjectPath):
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            (target / path.relative_to(folder).as_posix()).write_bytes(path.read_bytes())


def remove_tree(path: Path) -> None:
    """Removes a folder with all it holds, as far as possible."""
    if isinstance(path, ObjectPath):
        path.remove_all()
    else:
        shutil.rmtree(path, ignore_errors=True)
