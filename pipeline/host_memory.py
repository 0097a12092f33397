"""The machine: the C library's allocator as training steps on CPUs and decoders want it, and the CPUs there are."""

import ctypes
import os

# Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def keep_freed_memory(most_bytes: int = 1 << 30) -> bool:
    """Keeps freed buffers of up to ``most_bytes`` in the process. False where the C library has no such setting.

    XLA's CPU client asks for a step's temporary memory anew each time. glibc gives large blocks back to the system at
    once, and touching them again cost a quarter of the demo's step (benchmarks/cpu_step.py). Decoders ask for frames
    anew for each sample.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, most_bytes) and mallopt(_TRIM_THRESHOLD, most_bytes))


def machine_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
