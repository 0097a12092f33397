"""Runs that their devices cannot hold: refused, with the settings that would make them fit."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax

from model.config import ModelConfig
from model.structure import Structure
from pipeline.errors import RequestError, one_line
from pipeline.train import devices
from pipeline.train.memory_need import Need, at_least, batch_bytes, estimated_parts, gib, layout_here, peak_bytes

if TYPE_CHECKING:
    from pipeline.train.mixture.schedule import Schedule

# Share of a memory that an advice leaves free.
MARGIN = 0.1
# Maximum factors on the number of devices, and of the batches, that are tried.
_MAX_FACTOR = 1 << 12

# A TPU compiler's refusal.
_OUT_OF_MEMORY = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

# Words for a change, and the need that it leaves.
_Change = tuple[str, Need]


def advice(need: Need, limit: float) -> str:
    """The settings that would make a run fit with a margin, tried by arithmetic: one if one will do, else several.

    limit: bytes of one memory.
    """
    room, need = (1 - MARGIN) * limit, need.of_the_largest()
    for words, changed in _singles(need):
        if (size := changed.total()) <= room:
            return f"{words} would make it fit (about {gib(size)})"
    names, changed = [], need
    while (found := _first_that_helps(changed)) is not None:
        words, changed = found
        names.append(words)
        if (size := changed.total()) <= room:
            return f"{', '.join(names)} together would make it fit (about {gib(size)})"
    last = [found for found in (_smaller_batches(changed, room), _more_devices(changed, room)) if found]
    if not last:
        return "no batch and no number of devices would make it fit: use a smaller model.variant"
    return f"{''.join(f'{name}, ' for name in names)}{' or '.join(last)} would make it fit"


def _singles(need: Need) -> Iterator[_Change]:
    """The changes of one setting, those first that cost least."""
    config, layout = need.config, need.layout
    if config.remat != "full":
        yield "model.remat: full", dataclasses.replace(need, config=dataclasses.replace(config, remat="full"))
    if layout.num_devices > 1 and not layout.fsdp:
        yield "cluster.fsdp: true", dataclasses.replace(need, layout=dataclasses.replace(layout, fsdp=True))
    experts = config.moe.num_experts if config.moe else 1
    for number in range(experts, layout.expert_parallel, -1):
        if experts % number == layout.num_devices % number == 0:
            wider = dataclasses.replace(layout, expert_parallel=number)
            yield f"cluster.expert_parallel: {number}", dataclasses.replace(need, layout=wider)


def _first_that_helps(need: Need) -> _Change | None:
    size = need.total()
    return next((change for change in _singles(need) if change[1].total() < size), None)


def _smaller_batches(need: Need, room: float) -> str | None:
    largest, factor = max(s.global_batch_size for s in need.structures), 2
    while largest % (factor * need.layout.num_devices) == 0 and factor <= _MAX_FACTOR:
        if dataclasses.replace(need, samples=1 / factor).total() <= room:
            return f"batches of {largest // factor:,} samples in place of {largest:,}"
        factor *= 2
    return None


def _more_devices(need: Need, room: float) -> str | None:
    largest, factor = max(s.global_batch_size for s in need.structures), 2
    while largest % (factor * need.layout.num_devices) == 0 and factor <= _MAX_FACTOR:
        for fsdp in dict.fromkeys((need.layout.fsdp, True)):
            more = dataclasses.replace(need.layout, num_devices=factor * need.layout.num_devices, fsdp=fsdp)
            if dataclasses.replace(need, layout=more).total() <= room:
                return f"{more.num_devices:,} devices" + " with cluster.fsdp: true" * (fsdp and not need.layout.fsdp)
        factor *= 2
    return None


class MemoryCheck:
    """The memory of the devices at hand against the needs of a run: refuses what cannot fit, and nothing else.

    limit: bytes of one memory, swap included; None if unknown: nothing is refused. where: its holder, in words.
    needed: bytes as compiled so far, with the state of all groups; 0 before anything is.
    """

    def __init__(self, need: Need, *, limit: int | None, where: str) -> None:
        self.need, self.limit, self.where = need, limit, where
        self._state = need.state()
        self.needed = 0

    def check_state(self) -> None:
        """Raises RequestError if the state alone is larger than the memory."""
        self._refuse(self._state, "parameters and moments take", self.need)

    def check_step(self, structure: Structure, found: Any) -> None:
        """Counts a compiled step; raises RequestError if it cannot fit. found: ``memory_analysis()`` of it, or None."""
        if found is None:
            return
        layout = self.need.layout
        step = peak_bytes(found, layout) - found.argument_size_in_bytes * layout.sharing
        size = self._state + step + batch_bytes(structure, layout)
        self.needed = max(self.needed, size)
        if self.limit is not None and size > self.limit:
            parts = estimated_parts(self.need.config, structure, layout)
            work = max(1.0, (step - parts["gradients"]) / max(1, parts["activations"]))
            need = dataclasses.replace(self.need, work=work)
            self._refuse(size, "the state and a compiled step take", need)

    def check_refusal(self, structure: Structure, error: Exception) -> None:
        """Raises RequestError if the compiler has refused a step for its memory, and says how much it needs.

        Other failures for lack of memory may be those of a moment, such as a GPU's while kernels are tried out.
        """
        words, size = out_of_memory(error) or ("", None)
        if size is not None:
            line = f"a step needs more memory than {self.where} has: {words}"
            need = dataclasses.replace(self.need, structures=(structure,))
            raise RequestError(line if self.limit is None else f"{line}: {advice(need, self.limit)}") from error

    def compiled_line(self) -> str:
        """The memory of the steps compiled so far."""
        of = f" of the {gib(self.limit)} of {self.where}" if self.limit else ""
        return f"compiled: the first step and the whole state take {gib(self.needed)}{of}"

    def _refuse(self, size: int, takes: str, need: Need) -> None:
        if self.limit is not None and size > self.limit:
            raise RequestError(
                f"{takes} {gib(size)} of memory, {self.where} has {gib(self.limit)}: {advice(need, self.limit)}"
            )


def out_of_memory(error: Exception) -> tuple[str, int | None] | None:
    """(its reason in words, bytes that it says are needed) of a compiler's refusal for lack of memory; None if that is
    not its reason."""
    found = _OUT_OF_MEMORY.search(str(error))
    if found is not None:
        return f"needs {found[1]} {found[2]}iB of {found[3]} {found[4]}iB", int(float(found[1]) * _UNITS[found[2]])
    return (one_line(error, limit=200), None) if "RESOURCE_EXHAUSTED" in str(error) else None


def run_need(
    config: ModelConfig, schedule: Schedule, *, expert_parallel: int, fsdp: bool, freeze: Sequence[str]
) -> Need:
    """The need of a run on the devices of this process. config: with the type that they compute in.

    Experts that these devices cannot share count as lying on each: a look at the data may be taken elsewhere.
    """
    shared = expert_parallel if jax.device_count() % expert_parallel == 0 else 1
    layout = layout_here(expert_parallel=shared, fsdp=fsdp, freeze=tuple(freeze))
    steps = tuple(dict.fromkeys(schedule.structures.values()))
    others = tuple(s for s in dict.fromkeys(schedule.model_structures) if s not in steps)
    return Need(at_least(config, layout.platform), steps, layout, others)


def memory_check(need: Need) -> MemoryCheck:
    """The check against the devices of this process."""
    limit, where = devices.memory_limit()
    if limit is not None and need.layout.platform == "cpu":
        limit += devices.swap_bytes()
    return MemoryCheck(need, limit=limit, where=where)
