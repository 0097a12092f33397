"""Bytes of a media file from any file system. Unreachable storage is retried, and is never a reject."""

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

# Attempts to read from storage, and seconds before the second one; each later wait is twice as long.
_ATTEMPTS = 5
_FIRST_WAIT_S = 0.5
_OBJECT_STORES = ("s3", "gs", "gcs")
# Options that pyarrow takes after a "?". Any other "?" is part of a key.
_OPTIONS = re.compile(
    r"\?(?:region|scheme|endpoint_override|retry_limit_seconds|project_id|allow_\w+|tls_\w+)=[^/?]*$", re.ASCII
)
_BUCKET = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
# By default Google's client retries for a quarter of an hour, and then we retry.
_GCS_PATIENCE = "retry_limit_seconds=30"
# Without permission to list a bucket, S3 does not distinguish missing from forbidden files.
_DENIED_ADVICE = "access denied, or missing where listing is denied; check credentials and permissions: "
_DENIED = re.compile("ACCESS_DENIED|PERMISSION_DENIED|UNAUTHENTICATED|SIGNATURE_DOES_NOT_MATCH|INVALID_ACCESS_KEY")
# Part of what Google's client says of credentials that it cannot use. It calls them an invalid argument.
_NO_TOKEN = "OAuth2 access token"
# Errors of impossible names: a path of a thousand letters is a caption in the wrong column.
NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
T = TypeVar("T")

# A member of a tar is named by the tar, its offset and its length: "shards/00012.tar#1536+80211".
MEMBER = re.compile(r"(.+\.tar)#(\d+)\+(\d+)", re.IGNORECASE | re.DOTALL)


def check_uri(path: str, allowed: tuple[str, ...]) -> None:
    """Raises Reject for a URI of a forbidden scheme, or an impossible one.

    A row must not choose the code that reads it. fsspec chains schemes ("simplecache::https://...",
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
    """Whether a URI has the parts its scheme requires. Clients would take a malformed one for an outage."""
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
    """A manifest's path for a file inside a tar."""
    return f"{tar}#{offset}+{length}"


def resolve_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """(filesystem, path) of a local path or of a URI that pyarrow or fsspec knows.

    Keys after s3://BUCKET/ and gs://BUCKET/ are literal, not percent-encoded, as in manifests. Raises RequestError for
    an unknown scheme or a missing package, OSError if a store does not answer.
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
    """An object store, opened once a process: each opening connects, fetches credentials and locates the bucket."""
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


def with_retries(path: str, read: Callable[[], T]) -> T:
    """``read()``, retried after a pause if storage fails. Raises DataError if it keeps failing.

    Not only OSError: backends of fsspec have their own errors.
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
    # "Permission denied" is retried as well: credentials may be refreshed during a run.
    advice = _DENIED_ADVICE if _is_denied(failure) else ""
    raise DataError(f"storage: {path} could not be read after {_ATTEMPTS} tries: {advice}{one_line(failure)}")


def _is_denied(error: Exception) -> bool:
    return isinstance(error, PermissionError) or bool(_DENIED.search(str(error)))


def read_bytes(path: str, *, max_bytes: int | None = None) -> bytes:
    """The whole file, or the whole member of a tar.

    Raises Reject if it is missing, empty or larger than ``max_bytes``; DataError if storage stays unreachable, denies
    access or lacks the whole bucket; RequestError if no installed package can open such a URI.
    """
    return with_retries(path, lambda: _read_once(path, max_bytes))


def _read_once(path: str, max_bytes: int | None) -> bytes:
    member = MEMBER.fullmatch(path)
    filesystem, inner = resolve_filesystem(member[1] if member else path)
    try:
        info = file_info(filesystem, inner)
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


def file_info(filesystem: pyarrow.fs.FileSystem, path: str) -> pyarrow.fs.FileInfo:
    """A file system's entry for a path. Raises ArrowInvalid if no file can have such a name, OSError if unclear."""
    try:
        return filesystem.get_file_info(path)
    except pa.ArrowInvalid as e:
        if _NO_TOKEN in str(e):
            raise PermissionError(one_line(e)) from e
        raise


def check_store(filesystem: pyarrow.fs.FileSystem, path: str) -> None:
    """Checks the store of a file that was not found. Raises DataError without its bucket, OSError if unclear."""
    if isinstance(filesystem, (pyarrow.fs.S3FileSystem, pyarrow.fs.GcsFileSystem)):
        bucket = path.partition("/")[0]
        try:
            found = filesystem.get_file_info(bucket).type
        except OSError as e:
            if not _is_denied(e):
                raise
            return  # access is denied, so the bucket exists
        if found == pyarrow.fs.FileType.NotFound:
            raise DataError(f"storage: bucket {bucket!r} of {path} does not exist")
    elif isinstance(filesystem, pyarrow.fs.PyFileSystem) and "http" in filesystem.handler.fs.protocol:
        _check_answer(filesystem.handler.fs, path)


def _check_answer(web, url: str) -> None:
    """Raises OSError unless the server itself answered "not found": fsspec reports every HTTP failure that way."""
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
    # Some file systems do not report sizes.
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
        return read_bytes(path, max_bytes=max_bytes)  # unreachable storage is retried, never a reject
    if not stat.S_ISREG(status.st_mode):
        raise Reject("missing_file", path)
    if not status.st_size:
        raise Reject("empty_file", path)
    _check_size(status.st_size, max_bytes)
    return path


def confirm_readable(path: str) -> None:
    """Reads a local file to its end: a decoder's complaint may come from unreachable storage.

    Raises DataError then, as ``read_bytes`` does.
    """
    with_retries(path, lambda: _read_through(path))


def _read_through(path: str) -> None:
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 20):
            pass
