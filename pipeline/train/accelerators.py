"""The accelerators that are known: their memory, links, hosts and prices."""

from __future__ import annotations

import dataclasses

from pipeline.train.devices import peak_flops

# Date of the prices below.
PRICED = "2026-11-26"


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator.

    kind: as ``jax.Device.device_kind`` has it. memory_bytes: those that a program may use. link_bytes: bytes a second
    that one device sends to its neighbours, all links together. per_host: devices of one host. price: US dollars an
    hour, a list price on demand that ``--prices`` replaces; None if unknown. clock: cycles a second, by which a TPU
    compiler's estimates become seconds.
    """

    name: str
    kind: str
    memory_bytes: int
    link_bytes: float
    per_host: int = 8
    price: float | None = None
    clock: float | None = None

    @property
    def peak_flops(self) -> float | None:
        """Dense bfloat16 FLOP/s."""
        return peak_flops(self.kind)


_GIB = 1 << 30
# Memory, links, hosts and clocks from Google Cloud's pages of each TPU version (hosts of a slice of several; clock: the
# peak over the multiply-adds of a cycle) and NVIDIA's data sheets; the memory of a GPU is what JAX takes of it by
# default. Prices are list prices on demand of Google Cloud (TPUs, central regions) and of AWS (p5, p5en; an eighth of
# the instance).
DEVICES = {
    device.name: device
    for device in (
        Device("v4", "TPU v4", int(30.75 * _GIB), 300e9, per_host=4, price=3.22, clock=1.05e9),
        Device("v5e", "TPU v5 lite", int(15.75 * _GIB), 200e9, per_host=4, price=1.20, clock=1.5e9),
        Device("v5p", "TPU v5", int(95.0 * _GIB), 600e9, per_host=4, price=4.20, clock=1.75e9),
        Device("v6e", "TPU v6 lite", int(31.25 * _GIB), 448e9, per_host=4, price=2.70, clock=1.75e9),
        Device("h100", "NVIDIA H100 80GB HBM3", int(0.75 * 79.6 * _GIB), 450e9, price=6.88),
        Device("h200", "NVIDIA H200", int(0.75 * 140.0 * _GIB), 450e9, price=7.91),
        Device("a100", "NVIDIA A100-SXM4-80GB", int(0.75 * 79.2 * _GIB), 300e9, price=3.43),
    )
}


def price_of(kind: str) -> float | None:
    """US dollars an hour of a device of a kind; None if unknown."""
    return next((device.price for device in DEVICES.values() if device.kind == kind), None)
