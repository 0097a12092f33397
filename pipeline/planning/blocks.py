"""The time of a step on the devices at hand, from small blocks of its model that are timed there.

A block has the step's inputs, width and kinds of layers, but few layers and, where a whole batch would take long, few
samples. A step's time is taken to be linear in the number of layers at a number of samples, and in the number of
samples at a number of layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from jax.sharding import AbstractMesh, Mesh

from model import sharding, sizes
from model.config import ModelConfig
from model.structure import Structure

# Maximum FLOPs of a block on a CPU and on an accelerator, all devices together.
_CPU_FLOPS, _DEVICE_FLOPS = 1e11, 1e14
# Repeats of the smallest group of layers in the two blocks.
_SHORT, _LONG = 1, 2


def unit(config: ModelConfig) -> tuple[int, int]:
    """(layers of the smallest group with the model's mixture of dense and sparse ones, number of such groups)."""
    sparse = config.moe.num_layers if config.moe else 0
    times = math.gcd(sparse, config.depth - sparse)
    return config.depth // times, times


def with_units(config: ModelConfig, number: int) -> ModelConfig:
    """The model with another number of groups of layers."""
    layers, times = unit(config)
    moe = config.moe and dataclasses.replace(config.moe, num_layers=config.moe.num_layers // times * number)
    return dataclasses.replace(config, depth=layers * number, moe=moe)


def block_sizes(config: ModelConfig, structure: Structure, mesh: Mesh | AbstractMesh, *, on_cpu: bool) -> list[int]:
    """Numbers of samples to time: the whole batch if it is quick, else the largest that is, and half of it."""
    limit = _CPU_FLOPS if on_cpu else _DEVICE_FLOPS
    long, size = with_units(config, min(_LONG, unit(config)[1])), structure.global_batch_size
    while sizes.structure_flops(long, _resized(structure, size)) > limit and _can_halve(config, structure, size, mesh):
        size //= 2
    if size == structure.global_batch_size or not _can_halve(config, structure, size, mesh):
        return [size]
    return [size, size // 2]


def _resized(structure: Structure, size: int) -> Structure:
    return dataclasses.replace(structure, global_batch_size=size, microbatches=min(structure.microbatches, size))


def _can_halve(config: ModelConfig, structure: Structure, size: int, mesh: Mesh | AbstractMesh) -> bool:
    if size % 2 or (size // 2) % structure.microbatches:
        return False
    half = _resized(structure, size // 2)
    try:
        sharding.check_batch(half, half.group_samples(config), mesh)
    except ValueError:
        return False
    return True


def step_seconds(
    config: ModelConfig, structure: Structure, mesh: Mesh, timed: Callable[[ModelConfig, Structure], float]
) -> float:
    """Seconds of a step by its blocks. timed: (config, structure) → seconds of a step that is run."""
    times, found = unit(config)[1], []
    numbers = block_sizes(config, structure, mesh, on_cpu=mesh.devices.flat[0].platform == "cpu")
    for size in numbers:
        part = _resized(structure, size)
        short = timed(with_units(config, _SHORT), part)
        layers = 0.0 if times == _SHORT else timed(with_units(config, _LONG), part) - short
        found.append(short + (times - _SHORT) * max(0.0, layers))
    if len(found) == 1:
        return found[0] * structure.global_batch_size / numbers[0]
    whole, half = found
    a_sample = max(0.0, whole - half) / (numbers[0] - numbers[1])
    return whole + a_sample * (structure.global_batch_size - numbers[0])
