"""Bytes of a media file from any file system. Storage that cannot be reached is retried, and is never a reject."""

from __future__ import annotations

import errno
import functools
import os
import re
import stat
import time
import urllib.parse
from collections.abc import Callable
from typing import TypeVar

import pyarrow as pa
import pyarrow.fs

from pipeline.credentials import HIDDEN
from pipeline.data.media.errors import Reject
from pipeline.errors import DataError, RequestError, one_line

_ATTEMPTS, _FIRST_WAIT_S = 5, 0.5
_OBJECT_STORES = ("s3", "gs", "gcs")
# What pyarrow takes behind a "?". Any other "?" is part of a key.
_OPTIONS = re.compile(
    r"\?(?:region|scheme|endpoint_override|retry_limit_seconds|project_id|allow_\w+|tls_\w+)=[^/?]*$", re.ASCII
)
_BUCKET = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
# Left alone, Google's client tries for a quarter of an hour, and then it is asked again.
_GCS_PATIENCE = "retry_limit_seconds=30"
# Without the right to list a bucket, S3 does not tell what is missing from what is forbidden.
_DENIED_ADVICE = "access denied, or missing where listing is denied; check credentials and permissions: "
_DENIED = re.compile("ACCESS_DENIED|PERMISSION_DENIED|UNAUTHENTICATED|SIGNATURE_DOES_NOT_MATCH|INVALID_ACCESS_KEY")
# No file can have such a name: a path of a thousand letters is a caption in the wrong column.
NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
T = TypeVar("T")

# A member of a tar is named by the tar, its offset and its length: "shards/00012.tar#1536+80211".
MEMBER = re.compile(r"(.+\.tar)#(\d+)\+(\d+)", re.IGNORECASE | re.DOTALL)


def check_uri(path: str, allowed: tuple[str, ...]) -> None:
    """Raises Reject where a path is a URI of another scheme, or one that no file can have.

    A row must not choose what runs to read it. fsspec chains several ("simplecache::https://...",
    "zip://a::s3://..."): each must be allowed.
    """
    if "://" not in path:
        return
    first, *others = path.split("::") if path.partition("://")[0] not in _OBJECT_STORES else [path]
    unknown = [s for s in (part.partition("://")[0] for part in (first, *others)) if s not in allowed]
    if unknown:
        found = repr(unknown[0][:40])
        raise Reject("unknown_scheme", f"{found}, allowed are {', '.join(allowed)}; data_sets.NAME.schemes adds others")
    scheme, _, rest = path.partition("://")
    if not _can_be(scheme, rest):
        raise Reject("bad_uri", f"no file can have the address {path[:200]}")


def _can_be(scheme: str, rest: str) -> bool:
    """Whether what follows a scheme has the parts that it must have: clients take what has not for an outage."""
    if scheme in _OBJECT_STORES:
        return _BUCKET.fullmatch(rest.partition("/")[0].rpartition("@")[2]) is not None and "\0" not in rest
    if scheme == "hf":
        return all(rest.split("/", 2)) and rest.count("/") >= 2
    if scheme in ("http", "https"):
        try:
            parts = urllib.parse.urlsplit(f"{scheme}://{rest}")
            return bool(parts.hostname) and not re.search(r"\s", parts.netloc) and parts.port != 0
        except ValueError:
            return False
    return True


def member_path(tar: str, offset: int, length: int) -> str:
    """What a manifest says for the bytes of a file inside a tar."""
    return f"{tar}#{offset}+{length}"


def resolve_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """(filesystem, path) of a local path or of a URI that pyarrow or fsspec knows.

    What follows s3://BUCKET/ and gs://BUCKET/ is a key as it stands, with nothing percent-encoded: so manifests name
    files. Raises RequestError for an unknown scheme or a missing package, OSError where a store does not answer.
    """
    scheme, is_uri, rest = uri.partition("://")
    if not is_uri:
        return pyarrow.fs.LocalFileSystem(), uri
    if f"{HIDDEN}@" in rest or f"={HIDDEN}" in rest:
        raise RequestError(
            f"storage: {uri} is without its credentials, which are never stored; name a recipe with them"
        )
    if scheme in _OBJECT_STORES:
        return _in_bucket(scheme, rest)
    try:
        return pyarrow.fs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, ImportError):
        return _by_fsspec(uri)


def _in_bucket(scheme: str, rest: str) -> tuple[pyarrow.fs.FileSystem, str]:
    found = _OPTIONS.search(rest)
    place, options = (rest[: found.start()], found[0]) if found else (rest, "")
    bucket, _, key = place.partition("/")
    if scheme != "s3" and "retry_limit_seconds" not in options:
        options += ("&" if options else "?") + _GCS_PATIENCE
    return _object_store(f"{scheme}://{bucket}{options}"), f"{bucket.rpartition('@')[2]}/{key}".rstrip("/")


@functools.lru_cache(maxsize=64)
def _object_store(uri: str) -> pyarrow.fs.FileSystem:
    """Opened once a process: a new one connects anew, asks for credentials and where its bucket lies."""
    try:
        return pyarrow.fs.FileSystem.from_uri(uri)[0]
    except pa.ArrowInvalid as e:
        raise RequestError(f"storage: {one_line(e)}") from e


def _by_fsspec(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as e:
        why = f" ({one_line(e.__cause__)})" if e.__cause__ else ""
        raise RequestError(f"storage: {uri} cannot be opened: {one_line(e)}{why}") from e
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)), path


def patiently(path: str, read: Callable[[], T]) -> T:
    """``read()``, again after a pause where storage fails. Raises DataError when it keeps failing.

    What lies behind fsspec has errors of its own, not all of them OSErrors.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return read()
        except (Reject, DataError, RequestError, MemoryError):
            raise
        except Exception as e:
            failure = e
        if attempt < _ATTEMPTS - 1:
            time.sleep(_FIRST_WAIT_S * 2**attempt)
    # Refused is tried again too: keys are renewed while a run goes on.
    advice = _DENIED_ADVICE if _is_denied(failure) else ""
    raise DataError(f"storage: {path} could not be read after {_ATTEMPTS} tries: {advice}{one_line(failure)}")


def _is_denied(error: Exception) -> bool:
    return isinstance(error, PermissionError) or bool(_DENIED.search(str(error)))


def read_bytes(path: str, *, max_bytes: int | None = None) -> bytes:
    """The whole file, or the whole member of a tar.

    Raises Reject when it is missing, empty or larger than ``max_bytes``; DataError when storage stays out of reach or
    refuses, and when a whole bucket is missing; RequestError when nothing here can open such a URI.
    """
    return patiently(path, lambda: _read_once(path, max_bytes))


def _read_once(path: str, max_bytes: int | None) -> bytes:
    member = MEMBER.fullmatch(path)
    filesystem, inner = resolve_filesystem(member[1] if member else path)
    try:
        info = filesystem.get_file_info(inner)
    except (pa.ArrowInvalid, UnicodeEncodeError) as e:  # no file can have such a name
        raise Reject("missing_file", path) from e
    if info.type != pyarrow.fs.FileType.File:
        check_store(filesystem, inner)
        raise Reject("missing_file", path)
    _check_size(int(member[3]) if member else info.size, max_bytes)
    if member:
        content = _read_range(filesystem, inner, offset=int(member[2]), length=int(member[3]))
    else:
        with filesystem.open_input_stream(inner) as stream:
            content = stream.read()
    if not content:
        raise Reject("empty_file", path)
    return content


def check_store(filesystem: pyarrow.fs.FileSystem, path: str) -> None:
    """A file was not found: is there where it should be? Raises DataError without its bucket, OSError when unclear."""
    if isinstance(filesystem, (pyarrow.fs.S3FileSystem, pyarrow.fs.GcsFileSystem)):
        bucket = path.partition("/")[0]
        try:
            found = filesystem.get_file_info(bucket).type
        except OSError as e:
            if not _is_denied(e):
                raise
            return  # a bucket that may not be asked for is there
        if found == pyarrow.fs.FileType.NotFound:
            raise DataError(f"storage: there is no bucket {bucket!r} for {path}")
    elif isinstance(filesystem, pyarrow.fs.PyFileSystem) and "http" in filesystem.handler.fs.protocol:
        _check_answer(filesystem.handler.fs, path)


def _check_answer(web, url: str) -> None:
    """fsspec says "not found" for every failure over HTTP. Raises OSError unless the server itself has said so."""
    try:
        web.info(url)
    except FileNotFoundError as e:
        if e.__cause__ is None or getattr(e.__cause__, "status", None) in (404, 410):
            return
        raise OSError(f"{type(e.__cause__).__name__}: {e.__cause__}") from e
    raise OSError(f"{url} was not found at first")


def _read_range(filesystem, path: str, *, offset: int, length: int) -> bytes:
    with filesystem.open_input_file(path) as file:
        size = file.size()
        if offset + length > size:
            raise Reject("not_decodable", f"the tar has {size} bytes, the member ends at {offset + length}")
        file.seek(offset)
        return file.read(length)


def _check_size(found: int | None, max_bytes: int | None) -> None:
    # Some file systems do not tell a size.
    if found is not None and max_bytes is not None and found > max_bytes:
        raise Reject("too_large", f"{found} bytes, at most {max_bytes}")


def local_path_or_bytes(path: str, *, max_bytes: int | None = None) -> str | bytes:
    """A local file's path (decoders read it themselves), anything else as bytes. Raises as ``read_bytes`` does."""
    if "://" in path or MEMBER.fullmatch(path):
        return read_bytes(path, max_bytes=max_bytes)
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError) as e:
        raise Reject("missing_file", path) from e
    except OSError as e:
        if e.errno in NO_NAME:
            raise Reject("missing_file", path) from e
        return read_bytes(path, max_bytes=max_bytes)  # storage out of reach: retried, never a reject
    if not stat.S_ISREG(status.st_mode):
        raise Reject("missing_file", path)
    if not status.st_size:
        raise Reject("empty_file", path)
    _check_size(status.st_size, max_bytes)
    return path


def confirm_readable(path: str) -> None:
    """Reads a local file to its end and forgets it: a decoder's complaint may be storage that cannot be reached.

    Raises DataError then, as ``read_bytes`` does.
    """
    patiently(path, lambda: _read_through(path))


def _read_through(path: str) -> None:
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 20):
            pass
