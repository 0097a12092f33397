"""Machines that a run can be planned for: devices, their rates and prices, and the meshes made of them."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import jax
import yaml

from pipeline.errors import RequestError, one_line
from pipeline.planning import kernels
from pipeline.train.devices import host_bytes, peak_flops

# Date of the prices below.
PRICED = "2026-11-26"


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator.

    kind: as ``jax.Device.device_kind`` has it. memory_bytes: those that a program may use. link_bytes: bytes a second
    that one device sends to its neighbours, all links together. price: US dollars an hour, a list price on demand that
    ``--prices`` replaces; None if unknown. clock: cycles a second, by which a TPU compiler's estimates become seconds.
    """

    name: str
    kind: str
    memory_bytes: int
    link_bytes: float
    price: float | None = None
    clock: float | None = None

    @property
    def peak_flops(self) -> float | None:
        """Dense bfloat16 FLOP/s."""
        return peak_flops(self.kind)


_GIB = 1 << 30
# Memory, links and clocks from Google Cloud's pages of each TPU version (clock: the peak over the multiply-adds of a
# cycle) and NVIDIA's data sheets; the memory of a GPU is what JAX takes of it by default. Prices are list prices on
# demand of Google Cloud (TPUs, central regions) and of AWS (p5, p5en; an eighth of the instance).
DEVICES = {
    device.name: device
    for device in (
        Device("v4", "TPU v4", int(30.75 * _GIB), 300e9, price=3.22, clock=1.05e9),
        Device("v5e", "TPU v5 lite", int(15.75 * _GIB), 200e9, price=1.20, clock=1.5e9),
        Device("v5p", "TPU v5", int(95.0 * _GIB), 600e9, price=4.20, clock=1.75e9),
        Device("v6e", "TPU v6 lite", int(31.25 * _GIB), 448e9, price=2.70, clock=1.75e9),
        Device("h100", "NVIDIA H100 80GB HBM3", int(0.75 * 79.6 * _GIB), 450e9, price=6.88),
        Device("h200", "NVIDIA H200", int(0.75 * 140.0 * _GIB), 450e9, price=7.91),
        Device("a100", "NVIDIA A100-SXM4-80GB", int(0.75 * 79.2 * _GIB), 300e9, price=3.43),
    )
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices of one kind. topology: of TPUs, such as (4, 8, 8). here: they are those of this process."""

    device: Device
    num_devices: int
    topology: tuple[int, ...] = ()
    here: bool = False

    @property
    def name(self) -> str:
        """As the command line has it."""
        if self.here:
            return "here"
        shape = "x".join(map(str, self.topology)) if self.topology else str(self.num_devices)
        return f"{self.device.name}:{shape}"

    @property
    def platform(self) -> str:
        """ "tpu", "gpu" or "cpu"."""
        if self.here:
            return jax.default_backend()
        return "tpu" if self.topology else "gpu"


def tpu(text: str) -> Machine:
    """The machine of "v4:4x8x8". Raises RequestError."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", text)
    known = [d.name for d in DEVICES.values() if d.clock]
    if found is None or found[1] not in known:
        raise RequestError(f"--topology: expected one of {', '.join(known)} and its shape, e.g. v4:4x8x8; found {text}")
    shape = tuple(int(n) for n in found[2].split("x"))
    return Machine(DEVICES[found[1]], math.prod(shape), topology=shape)


def gpus(text: str) -> Machine:
    """The machine of "h200:8". Raises RequestError."""
    found = re.fullmatch(r"(\w+):([1-9]\d*)", text)
    known = [d.name for d in DEVICES.values() if not d.clock]
    if found is None or found[1] not in known:
        raise RequestError(f"--gpu: expected one of {', '.join(known)} and a number, e.g. h200:8; found {text}")
    return Machine(DEVICES[found[1]], int(found[2]))


def here() -> Machine:
    """The devices of this process."""
    first = jax.devices()[0]
    limit = host_bytes() if first.platform == "cpu" else (first.memory_stats() or {}).get("bytes_limit", 0)
    return Machine(Device("here", first.device_kind, limit, math.inf), jax.device_count(), here=True)


def with_prices(machine: Machine, path: Path) -> Machine:
    """The machine with the price that a YAML file of names and dollars an hour gives it. Raises RequestError."""
    try:
        prices = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise RequestError(f"--prices: cannot read {path}: {one_line(e)}") from e
    valid = isinstance(prices, dict) and all(
        isinstance(price, int | float) and not isinstance(price, bool) and 0 <= price < math.inf
        for price in prices.values()
    )
    if not valid:
        raise RequestError(f"--prices: expected lines such as 'h200: 7.91' (dollars an hour) in {path}")
    price = prices.get(machine.device.name, machine.device.price)
    return dataclasses.replace(machine, device=dataclasses.replace(machine.device, price=price))


def devices_of(machine: Machine) -> list[Any]:
    """Devices to compile for. Raises RequestError if libtpu is missing or does not know the topology."""
    if machine.here:
        return jax.devices()
    from jax.experimental import topologies

    kernels.schedules()
    chips = {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)} if len(machine.topology) == 3 else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=machine.name, num_slices=1, **chips)
    except (RuntimeError, ImportError, ValueError, NotImplementedError) as e:
        raise RequestError(
            f"--topology {machine.name}: the TPU compiler cannot be asked: {one_line(e, limit=200)}; it comes with "
            "pip install 'imp-pretrain[plan]'"
        ) from e
    return list(found.devices)
