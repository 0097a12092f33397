"""XLA's flags for tests: what they run is small, and compiling takes most of their time."""

from __future__ import annotations

from importlib.metadata import version


def quick_compile() -> str:
    """The same programs of simpler kernels, in a quarter of the time."""
    flags = ["--xla_backend_optimization_level=0"]
    # Later versions have only the kernels that compile more slowly, and do not know the flag.
    if version("jaxlib").startswith("0.10."):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(flags)
