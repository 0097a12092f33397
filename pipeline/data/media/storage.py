"""Bytes of a media file from any file system. Storage that cannot be reached is retried, and is never a reject."""

from __future__ import annotations

import os
import stat
import time

import pyarrow.fs

from pipeline.data.manifest import resolve_filesystem
from pipeline.data.media.errors import Reject
from pipeline.errors import DataError

_ATTEMPTS, _FIRST_WAIT_S = 5, 0.5


def read_bytes(path: str) -> bytes:
    """The whole file. Raises Reject when it is missing or empty, DataError when storage stays out of reach."""
    for attempt in range(_ATTEMPTS):
        try:
            filesystem, inner = resolve_filesystem(path)
            info = filesystem.get_file_info(inner)
            if info.type != pyarrow.fs.FileType.File:
                raise Reject("missing_file", path)
            with filesystem.open_input_stream(inner) as stream:
                content = stream.read()
            if not content:
                raise Reject("empty_file", path)
            return content
        except OSError as e:
            failure = e
            time.sleep(_FIRST_WAIT_S * 2**attempt)
    raise DataError(f"storage: {path} could not be read after {_ATTEMPTS} tries: {failure}")


def local_path_or_bytes(path: str) -> str | bytes:
    """A local file's path (decoders read it themselves), anything else as bytes."""
    if "://" in path:
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
