"""The host: its CPUs and memory, and its C library's allocator set up for training steps and decoders on CPUs."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
from pathlib import Path

# Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
# Limits of a container, as it sees them itself: of version 2 at the top, of version 1 in a folder for each resource.
_CGROUPS = Path("/sys/fs/cgroup")

# Memory of the machine.
_MACHINE_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def keep_freed_memory(max_bytes: int = 1 << 30) -> bool:
    """Keeps freed buffers of up to ``max_bytes`` in the process. Returns False if the C library cannot.

    XLA's CPU client allocates the temporary memory of every step anew. glibc returns large blocks to the system
    immediately, and touching them again cost a quarter of the demo's step (benchmarks/cpu_step.py). Decoders allocate
    frames anew for every sample.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, max_bytes) and mallopt(_TRIM_THRESHOLD, max_bytes))


def machine_cpus() -> int:
    """Number of CPUs that this process may use: its own, or what its container is given of them."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = _cpu_quota()
    return max(1, min(cpus, math.ceil(quota / period))) if quota > 0 < period else cpus


def _cpu_quota() -> tuple[int, int]:
    """The microseconds of CPU time that the container may take in each period, and the period; 0 without a limit."""
    files = ["cpu.max"] if (_CGROUPS / "cpu.max").exists() else ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]
    try:
        quota, period = map(int, " ".join(_text(_CGROUPS / name) for name in files).split())
    # No limit is set ("max"), or the files do not exist.
    except ValueError:
        return 0, 0
    return quota, period


def machine_bytes() -> int:
    """Memory that this process and its children may take: the machine's, or what its container is given."""
    total = _MACHINE_BYTES
    for path in ("memory.max", "memory/memory.limit_in_bytes"):
        # No limit is set ("max"), or the file does not exist.
        with contextlib.suppress(ValueError):
            total = min(total, int(_text(_CGROUPS / path)))
    return total


def used_share() -> float:
    """Share of the machine's memory, or of its container's, that is taken; 0 where the system does not tell.

    Files that the system keeps in memory until it needs the room do not count.
    """
    limit = machine_bytes()
    # Without a limit of its own the container is told of its own use alone, and the machine may be full of others'.
    if limit < _MACHINE_BYTES:
        for use, stat, files in (
            ("memory.current", "memory.stat", "inactive_file"),
            ("memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
        ):
            if text := _text(_CGROUPS / use):
                return (int(text) - _entry(_CGROUPS / stat, files)) / limit
    available = meminfo_bytes("MemAvailable")
    return 1 - available / limit if available else 0.0


def meminfo_bytes(name: str) -> int:
    """An entry of the system's list of memory; 0 without it."""
    return 1024 * _entry(Path("/proc/meminfo"), f"{name}:")


def _entry(path: Path, name: str) -> int:
    """The number behind a name at the start of a line; 0 without it."""
    words = (line.split() for line in _text(path).splitlines())
    return next((int(found[1]) for found in words if found[:1] == [name]), 0)


def _text(path: Path) -> str:
    """A file's text; empty without the file."""
    try:
        return path.read_text()
    except OSError:
        return ""
