"""Machines that a run can be planned for, and the devices to compile for."""

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
from pipeline.train import accelerators
from pipeline.train.accelerators import DEVICES, Device
from pipeline.train.devices import memory_limit


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
    def num_hosts(self) -> int:
        """Hosts of these devices."""
        return math.ceil(self.num_devices / self.device.per_host)

    @property
    def platform(self) -> str:
        """ "tpu", "gpu" or "cpu"."""
        if self.here:
            return jax.devices()[0].platform
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
    kind = jax.devices()[0].device_kind
    limit, _ = memory_limit()
    local, price = jax.local_device_count(), accelerators.price_of(kind)
    device = Device("here", kind, limit or 0, math.inf, per_host=local, price=price)
    return Machine(device, jax.device_count(), here=True)


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
