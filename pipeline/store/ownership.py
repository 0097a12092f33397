"""For whom a process writes to a run directory in a bucket: workers, for the holder of the lock in their driver."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from pipeline.store.path import ObjectPath

# Name of the lock in a run directory.
LOCK = ".lock"


def folder_of(lock: ObjectPath) -> str:
    """The beginning of the keys that a lock guards."""
    return f"{lock.parent.key}/"


def holder(run_dir: Path) -> str | None:
    """The owner for whom this process writes to a run directory; None for one on a disk, whose lock cannot be lost."""
    return run_dir.store.owner(folder_of(run_dir / LOCK)) if isinstance(run_dir, ObjectPath) else None


@contextlib.contextmanager
def writing_for(owner: str | None, run_dir: Path) -> Iterator[None]:
    """Writes to a run directory, inside the block, only while its lock names ``owner``, a ``holder`` elsewhere."""
    if owner is None or not isinstance(run_dir, ObjectPath):
        yield
        return
    path = run_dir / LOCK
    path.store.guard(folder_of(path), lock=path.key, owner=owner)
    try:
        yield
    finally:
        path.store.unguard(folder_of(path))
