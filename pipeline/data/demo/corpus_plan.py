"""A demo set before it is built, and the stable choices by which its rows are split."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any


@dataclasses.dataclass(frozen=True)
class CorpusPlan:
    """One set before it is built.

    jobs: one dict of JSON values for each media file, with its ``path`` below the corpus root and the arguments of the
    set's ``render``. manifests: split → rows, whose media paths are relative to the set's folder.
    """

    name: str
    jobs: list[dict[str, Any]]
    manifests: dict[str, list[dict[str, Any]]]


def stable_hash(*parts: str | int) -> int:
    """A 64-bit number that depends only on ``parts``.

    Decides splits in place of a random generator, whose stream numpy may change in later releases.
    """
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def first_rows(rows: list, *, limit: int | None, share: float) -> list:
    """The first rows of a split that gets ``share`` of a set of ``limit`` rows, at least one; all without a limit."""
    return rows if limit is None else rows[: max(1, round(limit * share))]
