"""Cycles of the attention kernels in a TPU program, of which the compiler gives no estimate: their scheduled bundles.

A TPU core runs one bundle of instructions a cycle. The schedule of a kernel is what the compiler dumps last; a loop's
bundles count as often as the loop runs. Waiting for memory is left out: a step's blocks are fetched and written during
its neighbours' steps, which take three times as long (docs/decisions/model.md).
"""

from __future__ import annotations

import atexit
import collections
import functools
import os
import re
import shutil
import tempfile
from pathlib import Path

from model import tpu_attention
from model.config import ModelConfig
from pipeline.planning.program import Kernel

# Cores of a chip, which share the steps of a kernel.
_CORES = {"v4": 2, "v5p": 2}

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*((?:>\s*)*)\{")


@functools.cache
def schedules() -> Path:
    """The folder where the TPU compiler writes the schedules of all it compiles from now on.

    Must be called before the first topology is asked for: libtpu reads its options once.
    """
    folder = Path(tempfile.mkdtemp(prefix="imp-schedules-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()
    return folder


def clear() -> None:
    """Forgets the schedules of earlier programs, whose kernels have the same names."""
    for path in schedules().iterdir():
        path.unlink()


def cycles(kernels: list[Kernel], config: ModelConfig, device: str) -> dict[str, float] | None:
    """Cycles of all runs of a program's kernels by their name, from the schedules that its compilation left.

    None if a kernel is not known, or has left no schedule.
    """
    found: dict[str, float] = collections.defaultdict(float)
    counted: dict[tuple, float] = {}
    for kernel in kernels:
        # Kernels that are alike are compiled once, under the name of one of them.
        if (of_one := _of_one(kernel, config, device)) is not None:
            counted[kernel.kind, kernel.dims] = of_one
    for kernel in kernels:
        if (kernel.kind, kernel.dims) not in counted:
            return None
        found[kernel.kind] += kernel.times * counted[kernel.kind, kernel.dims]
    return dict(found)


def _of_one(kernel: Kernel, config: ModelConfig, device: str) -> float | None:
    """Cycles of one run of a kernel."""
    files = list(schedules().glob(f"*-{kernel.name}-*[0-9]-final_bundles.txt"))
    if not files or kernel.kind not in (tpu_attention.FORWARD, tpu_attention.BACKWARD):
        return None
    heads = tpu_attention.heads_of_step(config.num_heads, config.head_dim, kernel.dims[-1])
    steps = kernel.dims[0] * (config.num_heads // heads)
    bundles = bundles_by_depth(files[0].read_text())
    rounds = heads // tpu_attention.heads_at_once(heads)
    # One loop over the grid, in it one over the heads of a step, which is none if it has one round.
    loops = bundles.get(1, 0) + rounds * sum(count for depth, count in bundles.items() if depth > 1)
    return bundles.get(0, 0) + steps / _CORES.get(device, 1) * loops


def bundles_by_depth(schedule: str) -> dict[int, int]:
    """Depth of nested loops → bundles there, from the text of a schedule."""
    found = (_BUNDLE.match(line) for line in schedule.splitlines())
    return dict(collections.Counter(match[1].count(">") for match in found if match))
