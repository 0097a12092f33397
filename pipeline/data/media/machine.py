"""The kind of CPU and the library versions that decoded bits depend on: docs/decisions/decoding.md."""

from __future__ import annotations

import functools
import platform
from importlib.metadata import PackageNotFoundError, version

# Instruction sets with their own sound decoders in FFmpeg and mpg123; no other one changes a bit.
_INSTRUCTIONS = ("avx", "avx2", "fma")
_LIBRARIES = ("av", "decord2", "numpy", "pillow", "scipy", "soundfile", "soxr")


@functools.cache
def cpu_kind() -> str:
    """The kind of CPU and the versions of the decoders, e.g. "x86_64 avx avx2 fma, av 18.1.0, numpy 2.4.6, ...".

    Machines with equal values decode every file to the same bits.
    """
    here = cpu_flags()
    cpu = " ".join([platform.machine(), *(name for name in _INSTRUCTIONS if name in here)])
    return ", ".join([cpu, *(f"{name} {_version(name)}" for name in _LIBRARIES)])


def cpu_flags() -> set[str]:
    """Flags of the first CPU; empty on systems without /proc/cpuinfo."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return next((set(line.split()) for line in file if line.startswith("flags")), set())
    except OSError:
        return set()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
