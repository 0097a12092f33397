"""The host: its number of CPUs, and its C library's allocator set up for training steps and decoders on CPUs."""

from __future__ import annotations

import ctypes
import os

# Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3


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
    """Number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
