"""The memory that a run needs of its devices: by arithmetic before anything is compiled, and as compiled."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import AbstractMesh

from model import sharding, sizes
from model.config import ModelConfig
from model.groups import named
from model.imp import Imp
from model.step import state_shapes
from model.structure import Structure

# Batches that lie on a device at a time: the one in use and those put there ahead.
BATCHES = 3


@dataclasses.dataclass(frozen=True)
class Layout:
    """The devices of a run, and how its state lies over them.

    platform: of the devices. sharing: devices that share one memory: those of a process on CPUs, 1 on accelerators.
    freeze: groups without gradients and moments.
    """

    num_devices: int
    expert_parallel: int = 1
    fsdp: bool = False
    platform: str = "gpu"
    sharing: int = 1
    freeze: tuple[str, ...] = ()

    @property
    def mesh(self) -> AbstractMesh:
        """The mesh of devices that need not be here."""
        return AbstractMesh((self.num_devices // self.expert_parallel, self.expert_parallel), sharding.AXES)

    def bytes_of(self, shapes: Any) -> int:
        """Bytes of a tree of parameters or moments in one memory. Raises ValueError if the experts cannot be shared."""
        shardings = sharding.state_shardings(shapes, self.mesh, fsdp=self.fsdp)
        both = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
        return self.sharing * sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in both)

    def part_of(self, size: int) -> int:
        """Bytes in one memory of what all devices share in equal parts."""
        return self.sharing * math.ceil(size / self.num_devices)


def layout_here(*, expert_parallel: int = 1, fsdp: bool = False, freeze: tuple[str, ...] = ()) -> Layout:
    """The layout over the devices of this run."""
    platform = jax.devices()[0].platform
    sharing = jax.local_device_count() if platform == "cpu" else 1
    return Layout(jax.device_count(), expert_parallel, fsdp, platform, sharing, tuple(freeze))


def state_bytes(config: ModelConfig, structures: Iterable[Structure], layout: Layout) -> int:
    """Bytes of the state of all groups in one memory."""
    return layout.bytes_of(_state_shapes(config, tuple(structures), layout.freeze))


def _state_shapes(config: ModelConfig, structures: tuple[Structure, ...], freeze: tuple[str, ...]) -> dict:
    return _shapes_of(dataclasses.replace(config, remat="auto"), structures, freeze)


# Trying settings asks for the same shapes again and again, which take a third of a second each.
@functools.lru_cache(maxsize=64)
def _shapes_of(config: ModelConfig, structures: tuple[Structure, ...], freeze: tuple[str, ...]) -> dict:
    return state_shapes(Imp.for_structures(config, list(structures)), freeze)


@functools.lru_cache(maxsize=256)
def whole_parts(config: ModelConfig, structure: Structure, freeze: tuple[str, ...] = ()) -> dict[str, int]:
    """``sizes.structure_memory`` with the attention that the config takes: of one device that holds all of the step."""
    fused = config.dtype == "bfloat16" and config.attention != "xla"
    return sizes.structure_memory(config, structure, fused=fused, freeze=freeze)


def batch_bytes(structure: Structure, layout: Layout) -> int:
    """Bytes of a batch in one memory."""
    arrays = jax.tree.leaves(structure.batch_shapes())
    return layout.part_of(sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays))


def estimated_parts(config: ModelConfig, structure: Structure, layout: Layout) -> dict[str, int]:
    """Bytes of a step in one memory, by part: by arithmetic, before anything is compiled."""
    state = _state_shapes(config, (structure,), layout.freeze)
    return {
        "state": layout.bytes_of(state),
        "gradients": _gradient_bytes(state, layout),
        "activations": layout.part_of(whole_parts(config, structure, layout.freeze)["activations"]),
        "batch": batch_bytes(structure, layout),
        "program": 0,
    }


def compiled_parts(found: Any, config: ModelConfig, structure: Structure, layout: Layout) -> dict[str, int]:
    """Bytes of a compiled step in one memory, by part. found: ``memory_analysis()`` of its executable.

    state: of the groups that it takes. gradients: as large as their parameters. activations: all of the peak that is
    nothing else, also copies and the working memory of single operations.
    """
    arguments = found.argument_size_in_bytes * layout.sharing
    gradients = _gradient_bytes(_state_shapes(config, (structure,), layout.freeze), layout)
    batch, program = batch_bytes(structure, layout), found.generated_code_size_in_bytes
    peak = peak_bytes(found, layout)
    return {
        "state": max(0, arguments - batch),
        "gradients": max(0, min(gradients, peak - arguments)),
        "activations": max(0, peak - arguments - gradients),
        "batch": batch,
        "program": program,
    }


def peak_bytes(found: Any, layout: Layout) -> int:
    """Bytes of a compiled step in one memory without its program: arguments, results that are not donated, temporaries.

    CPUs and GPUs take all temporaries as one block; of a TPU's the compiler says the peak.
    """
    planned = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    planned = (planned + found.temp_size_in_bytes) * layout.sharing
    peak = getattr(found, "peak_memory_in_bytes", 0) if layout.platform == "tpu" else 0
    return peak or planned


def _gradient_bytes(state: dict, layout: Layout) -> int:
    return layout.bytes_of({n: group["params"] for n, group in state.items() if not named(n, layout.freeze)})


@dataclasses.dataclass(frozen=True)
class Need:
    """The memory of a run with some settings.

    structures: of the steps. others: structures whose groups lie there too. samples: share of the batches. work: factor
    on the activations that arithmetic gives, from a compiled step.
    """

    config: ModelConfig
    structures: tuple[Structure, ...]
    layout: Layout
    others: tuple[Structure, ...] = ()
    samples: float = 1.0
    work: float = 1.0

    def _every(self) -> tuple[Structure, ...]:
        return tuple(sorted((*self.structures, *self.others), key=repr))

    def state(self) -> int:
        """Bytes of the state of all groups in the fullest memory."""
        return state_bytes(self.config, self._every(), self.layout)

    def total(self) -> int:
        """Bytes in the fullest memory: the state of all groups, batches, and the largest step's own."""
        return round(self.state() + max(map(self._step, self.structures), default=0))

    def of_the_largest(self) -> Need:
        """The need of the largest step alone, with the state of all groups: quicker to ask for other settings."""
        largest = max(self.structures, key=self._step)
        rest = tuple(s for s in (*self.structures, *self.others) if s != largest)
        return dataclasses.replace(self, structures=(largest,), others=rest)

    def _step(self, structure: Structure) -> float:
        """Bytes that a step takes beside the state, batches that wait included."""
        layout, every = self.layout, _state_shapes(self.config, self._every(), self.layout.freeze)
        own = {name: every[name] for name in structure.groups(self.config)}
        activations = layout.part_of(whole_parts(self.config, structure, layout.freeze)["activations"])
        held = BATCHES * batch_bytes(structure, layout) + self.work * activations
        return _gradient_bytes(own, layout) + self.samples * held


def at_least(config: ModelConfig, platform: str) -> ModelConfig:
    """The config by which a run is judged: on GPUs remat "auto" is "full" for a step that would not fit otherwise."""
    return dataclasses.replace(config, remat="full") if (platform, config.remat) == ("gpu", "auto") else config


def gib(count: float) -> str:
    """Bytes in GiB or, if few, in MiB, to two digits."""
    value, unit = (count / 2**30, "GiB") if count >= 2**30 / 10 else (count / 2**20, "MiB")
    return f"{value:.0f} {unit}" if value >= 9.95 else f"{value:.2g} {unit}"
