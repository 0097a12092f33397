"""The capabilities of the devices of a run, and the memory that a process holds."""

from __future__ import annotations

import dataclasses
import os
import re
import resource
import sys
from importlib.metadata import version

import jax

from model.config import ModelConfig
from pipeline import __version__
from pipeline.data.media.machine import cpu_kind
from pipeline.errors import EXIT_REQUEST, RequestError, one_line
from pipeline.host_memory import machine_bytes, meminfo_bytes
from pipeline.waiting import at_most

# Seconds for an accelerator to open; one that another process holds may never.
_OPEN_S = 55.0

# bfloat16 FLOP/s of one device, dense, by what ``jax.Device.device_kind`` contains; the first that matches counts.
# NVIDIA's data sheets (of H100, H200, B200: half of what they give with sparsity): A100 (nvidia-a100-datasheet), H100
# (SXM, PCIe, NVL), H200 (SXM, NVL), L4, DGX B200 (72 PFLOPS of FP8 in 8 GPUs, with sparsity). Google Cloud's pages of
# TPU v4, v5e, v5p and v6e; a device of v4 and v5p is a chip.
_PEAK_FLOPS = (
    (r"\bB200\b", 2250e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH[12]00 NVL\b", 835e12),
    (r"\bH[12]00\b", 989e12),
    (r"\bA100\b", 312e12),
    (r"\bL4\b", 121e12),
    (r"TPU v6( lite|e)", 918e12),
    (r"TPU v5( lite|e)", 197e12),
    (r"TPU v5", 459e12),
    (r"TPU v4$", 275e12),
)


def host_device() -> jax.Device:
    """The CPU; the first accelerator if JAX runs without the CPU platform."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def peak_flops(kind: str) -> float | None:
    """bfloat16 FLOP/s of one device of a kind, None if it is unknown, as for a part of a GPU (MIG)."""
    if "MIG" in kind:
        return None
    return next((peak for pattern, peak in _PEAK_FLOPS if re.search(pattern, kind)), None)


def check_backend(accelerator: str) -> None:
    """Raises RequestError if JAX does not use the requested accelerator: it would silently go on without."""
    if accelerator == "cpu":
        return
    asked = f"cluster.accelerator: {accelerator}"
    try:
        with at_most(
            _OPEN_S, f"error: {asked}: it did not open within {_OPEN_S:.0f} s; is it held?", code=EXIT_REQUEST
        ):
            found = jax.default_backend()
    except RuntimeError as e:
        raise RequestError(f"{asked}: JAX cannot open it: {one_line(e, limit=300)}") from e
    if found != accelerator:
        raise RequestError(
            f"{asked}: JAX computes on {found} here; install its {accelerator} build, and see what JAX_PLATFORMS says"
        )


def world() -> dict[str, object]:
    """The world that computes a run, and what its bits depend on, as plain values."""
    libraries = {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    return {
        "world_size": jax.process_count(),
        "num_devices": jax.device_count(),
        "device": jax.devices()[0].device_kind,
        "cpu_kind": cpu_kind(),
        "libraries": {"imp": __version__} | libraries,
    }


def memory() -> dict[str, int]:
    """rss_bytes: of this process. device_bytes, device_peak_bytes: of its fullest device, where devices say."""
    found = {"rss_bytes": _resident_bytes()}
    stats = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    for name, key in (("device_bytes", "bytes_in_use"), ("device_peak_bytes", "peak_bytes_in_use")):
        values = [s[key] for s in stats if key in s]
        if values:
            found[name] = max(values)
    return found


def memory_limit() -> tuple[int | None, str]:
    """(limit in bytes, None if unknown; the holder of the limit, "this machine" or "a device")."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit"), "a device"
    return machine_bytes(), "this machine"


def swap_bytes() -> int:
    """Swap space of this machine."""
    return meminfo_bytes("SwapTotal")


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        # Not Linux: the maximum so far, which macOS counts in bytes and others in KiB.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def use_compute_type(config: ModelConfig, platform: str | None = None) -> ModelConfig:
    """Resolves dtype "auto": bfloat16 on accelerators, float32 on CPUs. platform: None: of the devices at hand."""
    if config.dtype != "auto":
        return config
    platform = jax.devices()[0].platform if platform is None else platform
    return dataclasses.replace(config, dtype="float32" if platform == "cpu" else "bfloat16")


def use_compile_cache(folder: str | None) -> None:
    """Keeps compiled steps in a folder, for later processes; None: does not."""
    if folder is None:
        return
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as e:
        # JAX would warn of it in the middle of the steps, and name its own source file.
        line = f"warning: compiled steps are not kept for later runs (cluster.compile_cache): {one_line(e)}"
        print(line, file=sys.stderr, flush=True)
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
