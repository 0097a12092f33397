"""A step that runs on the devices at hand with a stand-in state and batch: its time, and the memory that it takes."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from model import sharding
from model.imp import Imp
from model.step import CompiledStep, state_shapes
from model.structure import Structure
from pipeline.host_memory import keep_freed_memory
from pipeline.planning.stand_in import arrays, fill

# Calls before the clock starts, the least that are timed, and the seconds after which no more are.
_WARM, _TIMED, _TIMED_S = 2, 3, 2.0


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a step took. memory_bytes: of a device, on CPUs of this process; None if it cannot be told."""

    step_s: float
    memory_bytes: int | None


class TimedStep:
    """A compiled step with its stand-in state and batch on the devices of a mesh."""

    def __init__(
        self,
        step: CompiledStep,
        imp: Imp,
        structure: Structure,
        *,
        mesh: Mesh,
        fsdp: bool = False,
        freeze: Sequence[str] = (),
    ) -> None:
        if mesh.devices.flat[0].platform == "cpu":
            keep_freed_memory()
        shapes = {name: state for name, state in state_shapes(imp, freeze).items() if name in step.groups}
        self._before = _in_use()
        self._step = step
        self._state = fill(shapes, sharding.state_shardings(shapes, mesh, fsdp=fsdp))
        self._batch = arrays(structure, sharding.over_batch(mesh))
        jax.block_until_ready((self._state, self._batch))

    def __call__(self) -> float:
        """Runs one step. Returns its seconds."""
        began = time.perf_counter()
        jax.block_until_ready(self._step(self._state, self._batch, jnp.float32(1e-4)))
        return time.perf_counter() - began

    def seconds(self) -> float:
        """Median seconds of a step, once it is warm."""
        return _median(self)

    def measure(self) -> Measured:
        """Time and memory.

        On accelerators memory is the allocator's peak since the process began, if this step has raised it. On CPUs it
        is the size of state and batch, and the growth of the process's resident memory while steps run: what the C
        library holds in reserve is returned to the system before.
        """
        step_s, after = self.seconds(), _in_use()
        if self._before is not None and after is not None:
            in_use, peak = self._before
            return Measured(step_s, after[1] - in_use if after[1] > peak else None)
        grown = [g for g in (self._growth() for _ in range(_TIMED)) if g is not None]
        live = sum(x.nbytes for x in jax.tree.leaves((self._state, self._batch)))
        return Measured(step_s, live + max(grown) if grown else None)

    def _growth(self) -> int | None:
        """Bytes by which resident memory grows while a step runs."""
        gc.collect()
        before = _trimmed_bytes()
        self()
        highest = _status_bytes("VmHWM")
        return None if before is None or highest is None else highest - before


def _median(step: TimedStep) -> float:
    found, began = [], time.perf_counter()
    while len(found) < _WARM + _TIMED or time.perf_counter() - began < _TIMED_S:
        found.append(step())
        # One that takes long is timed once.
        if found[-1] > _TIMED_S and len(found) > 1:
            break
    return statistics.median(found[min(_WARM, len(found) - 1) :])


def _in_use() -> tuple[int, int] | None:
    """(bytes in use, their peak so far) of the first device; None on CPUs."""
    stats: dict[str, Any] = jax.local_devices()[0].memory_stats() or {}
    return (stats["bytes_in_use"], stats["peak_bytes_in_use"]) if "peak_bytes_in_use" in stats else None


def _trimmed_bytes() -> int | None:
    """Resident bytes of this process after free memory was returned, with the peak counted anew; None if the system
    does not let it."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except (OSError, AttributeError):
        return None
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int | None:
    try:
        with open("/proc/self/status") as f:
            return next((1024 * int(line.split()[1]) for line in f if line.startswith(f"{name}:")), None)
    except OSError:
        return None
