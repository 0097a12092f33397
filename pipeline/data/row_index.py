"""Where a manifest's rows are, found once when a run starts: plain data that travels to all of its processes."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, repr=False)
class RowIndex:
    """The rows of a manifest as the run knows them.

    stamp: of the files as the first machine saw them; names the copy of the rows on every machine. fingerprint: of the
    rows (``columns.Fingerprint.digests``). folder: at which relative paths start. copied: machines that train copy the
    rows. files: a ``file_index.FileIndex`` for those that read them in place, empty if all copy them. began_ns: when
    the run looked at the files, in nanoseconds since 1970.
    """

    stamp: str
    fingerprint: dict
    folder: str
    files: bytes = b""
    copied: bool = False
    began_ns: int | None = None

    def __repr__(self) -> str:
        return f"RowIndex({self.stamp})"
