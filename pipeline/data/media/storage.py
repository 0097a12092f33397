"""Bytes of a media file from any file system. Storage that cannot be reached is retried, and is never a reject."""

from __future__ import annotations

import os
import re
import stat
import time

import pyarrow.fs

from pipeline.data.manifest import resolve_filesystem
from pipeline.data.media.errors import Reject
from pipeline.errors import DataError

_ATTEMPTS, _FIRST_WAIT_S = 5, 0.5


# A member of a tar is named by the tar, its offset and its length: "shards/00012.tar#1536+80211".
_MEMBER = re.compile(r"(.+\.tar)#(\d+)\+(\d+)", re.IGNORECASE | re.DOTALL)


def member_path(tar: str, offset: int, length: int) -> str:
    """What a manifest says for the bytes of a file inside a tar."""
    return f"{tar}#{offset}+{length}"


def read_bytes(path: str) -> bytes:
    """The whole file, or the whole member of a tar.

    Raises Reject when it is missing or empty, DataError when storage stays out of reach.
    """
    for attempt in range(_ATTEMPTS):
        try:
            member = _MEMBER.fullmatch(path)
            filesystem, inner = resolve_filesystem(member[1] if member else path)
            info = filesystem.get_file_info(inner)
            if info.type != pyarrow.fs.FileType.File:
                raise Reject("missing_file", path)
            if member:
                content = _read_range(filesystem, inner, offset=int(member[2]), length=int(member[3]))
            else:
                with filesystem.open_input_stream(inner) as stream:
                    content = stream.read()
            if not content:
                raise Reject("empty_file", path)
            return content
        except OSError as e:
            failure = e
            time.sleep(_FIRST_WAIT_S * 2**attempt)
    raise DataError(f"storage: {path} could not be read after {_ATTEMPTS} tries: {failure}")


def _read_range(filesystem, path: str, *, offset: int, length: int) -> bytes:
    with filesystem.open_input_file(path) as file:
        size = file.size()
        if offset + length > size:
            raise Reject("not_decodable", f"the tar has {size} bytes, the member ends at {offset + length}")
        file.seek(offset)
        return file.read(length)


def local_path_or_bytes(path: str) -> str | bytes:
    """A local file's path (decoders read it themselves), anything else as bytes."""
    if "://" in path or _MEMBER.fullmatch(path):
        return read_bytes(path)
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise Reject("missing_file", path) from e
    except OSError:
        return read_bytes(path)  # storage out of reach: retried, never a reject
    if not stat.S_ISREG(status.st_mode):
        raise Reject("missing_file", path)
    if not status.st_size:
        raise Reject("empty_file", path)
    return path
