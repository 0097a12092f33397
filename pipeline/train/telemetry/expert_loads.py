"""The use of each expert: running means of the routing of every task, variant and modality, layer by layer.

Letters: L layers with experts, counted from 0 in order of depth; E experts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.errors import one_line
from pipeline.files import write_json
from pipeline.train.telemetry.step_log import to_json_values

# Time constant of the running means, in steps of one task, variant and modality. The first steps count alike.
_MEAN_STEPS = 100
_STATISTICS = ("expert_load", "expert_slots", "unrouted_fraction")


class ExpertLoads:
    """Running means of expert_load (L, E), expert_slots (L, E), unrouted_fraction (L,) as in ``model/moe.py``."""

    def __init__(self):
        # (task, variant, modality) → {"steps": number of steps in the means, and the means}.
        self._entries: dict[tuple[str, str, str], dict] = {}

    @classmethod
    def read(cls, path: Path) -> ExpertLoads:
        """Reads what ``write`` wrote; empty without a file. Steps that a crashed run repeats count twice."""
        loads = cls()
        try:
            stored = json.loads(path.read_bytes()) if path.exists() else {}
            for task, variants in stored.items():
                for variant, modalities in variants.items():
                    for modality, entry in modalities.items():
                        means = {name: np.array(entry[name], np.float64) for name in _STATISTICS}
                        loads._entries[task, variant, modality] = means | {"steps": int(entry["steps"])}
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            # Only statistics: training does not depend on them.
            print(f"warning: {path} is damaged ({one_line(e)}); its means start again", file=sys.stderr, flush=True)
            return cls()
        return loads

    def add(self, task: str, variant: str, moe: dict) -> None:
        """Adds one step. moe: modality → routing statistics, each stacked by layer."""
        for modality, statistics in moe.items():
            values = {name: np.asarray(statistics[name], np.float64) for name in _STATISTICS}
            if not all(np.isfinite(value).all() for value in values.values()):
                continue
            zeros = {name: np.zeros_like(value) for name, value in values.items()}
            entry = self._entries.setdefault((task, variant, modality), zeros | {"steps": 0})
            entry["steps"] += 1
            weight = max(1 / entry["steps"], 1 / _MEAN_STEPS)
            for name, value in values.items():
                entry[name] = entry[name] + weight * (value - entry[name])

    def entries(self) -> Iterator[tuple[str, dict]]:
        """Yields (modality, means and steps) of every task and variant."""
        for (_, _, modality), entry in self._entries.items():
            yield modality, entry

    def write(self, path: Path) -> None:
        """Writes {task: {variant: {modality: {"steps", "expert_load": [layer][expert], ...}}}}; nothing if empty."""
        out: dict = {}
        for (task, variant, modality), entry in self._entries.items():
            out.setdefault(task, {}).setdefault(variant, {})[modality] = to_json_values(entry)
        if out:
            write_json(path, out)


def layer_means(moe: dict) -> dict:
    """Averages statistics stacked by layer over the layers, rounded to 7 digits."""
    return {modality: {k: _layer_mean(v) for k, v in values.items()} for modality, values in moe.items()}


def _layer_mean(values: np.ndarray | list) -> float | list[float]:
    mean = np.mean(values, axis=0)
    return to_json_values(mean) if mean.ndim else float(f"{mean:.7g}")
