"""A file that tells damage from storage that fails: it notes what its storage raises while a library reads it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TypeVar

import pyarrow.fs

T = TypeVar("T")


class NotingFile(io.RawIOBase):
    """A file of a file system that notes the first failure of the storage."""

    def __init__(self, filesystem: pyarrow.fs.FileSystem, path: str):
        self.failure: Exception | None = None
        self._file = self._noted(lambda: filesystem.open_input_file(path))
        self._size = self._noted(self._file.size)

    def _noted(self, step: Callable[[], T]) -> T:
        try:
            return step()
        except Exception as e:
            self.failure = self.failure or e
            raise

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._noted(lambda: self._file.seek(offset, whence))

    def tell(self) -> int:
        return self._file.tell()

    def size(self) -> int:
        return self._size

    def read(self, size: int = -1) -> bytes:
        return self._noted(lambda: self._file.read(None if size < 0 else size))
