"""What the bits of a decoded sample depend on beside its file and the recipe: docs/decisions/decoding.md."""

from __future__ import annotations

import functools
import platform
from importlib.metadata import PackageNotFoundError, version

# FFmpeg and mpg123 have versions of their sound decoders for these; no other instruction set changes a bit.
_INSTRUCTIONS = ("avx", "avx2", "fma")
_LIBRARIES = ("av", "decord2", "numpy", "pillow", "scipy", "soundfile", "soxr")


@functools.cache
def cpu_kind() -> str:
    """The kind of CPU and the versions of the decoders, e.g. "x86_64 avx avx2 fma, av 18.1.0, numpy 2.4.6, ...".

    Two machines for which it is equal decode every file to the same bits.
    """
    here = _cpu_flags()
    cpu = " ".join([platform.machine(), *(name for name in _INSTRUCTIONS if name in here)])
    return ", ".join([cpu, *(f"{name} {_version(name)}" for name in _LIBRARIES)])


def _cpu_flags() -> set[str]:
    """Of the first CPU; none where the system does not say so as Linux does."""
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
