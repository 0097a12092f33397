"""The speed of a step: examples and tokens per second, and the utilization of the devices."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from pipeline.train import devices


class Throughput:
    """Rates of a step over its whole time, waits included.

    flops: (task, variant) → FLOPs of a step. peak_flops: FLOP/s of one device; None: looked up by the kind of device.
    """

    def __init__(self, flops: Mapping[tuple[str, str], int], *, peak_flops: float | None):
        peak = peak_flops or devices.peak_flops(jax.devices()[0].device_kind)
        self._flops = flops
        self._peak = peak and peak * jax.device_count()

    def rates(self, record: Mapping) -> dict[str, float]:
        """examples_per_s, tokens_per_s and, if the devices' peak is known, mfu: the part of it that model FLOPs use."""
        busy_s = record["step_s"] + record["data_wait_s"] + record["compile_wait_s"]
        if not busy_s > 0:
            return {}
        rates = {f"{name}_per_s": round(record[name] / busy_s, 3) for name in ("examples", "tokens")}
        if self._peak:
            flops = self._flops[record["task"], record["variant"]]
            rates["mfu"] = float(f"{flops / busy_s / self._peak:.4g}")
        return rates
