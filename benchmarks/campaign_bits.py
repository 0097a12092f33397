"""Whether two runs gave the same: losses, sample ids, parameters, to the bit."""

from __future__ import annotations

import hashlib
from pathlib import Path

from benchmarks.campaign_run import records

# Of a line of metrics.jsonl: the results of a step.
EXACT = ("step", "task", "variant", "loss", "chance", "grad_norm", "learning_rate", "temperatures", "moe")


def parameters(run_dir: Path) -> dict[str, bytes]:
    """Every array of the last checkpoint as its bytes."""
    import jax
    import numpy as np

    from pipeline.evaluate.trained_model import TrainedModel

    params = TrainedModel(run_dir).params
    return {jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in jax.tree.leaves_with_path(params)}


def digest(arrays: dict[str, bytes]) -> str:
    """A SHA-256 of names and bytes."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(f"{name} {len(arrays[name])} ".encode() + arrays[name])
    return found.hexdigest()


def bits(run_dir: Path) -> dict:
    """What a finished run gave, as plain values that are equal for equal runs."""
    losses = [[record.get(key) for key in EXACT] for record in records(run_dir)]
    samples = {path.name: records(run_dir, path.name) for path in sorted(run_dir.glob("samples*.jsonl"))}
    return {"losses": losses, "samples": samples, "parameters": digest(parameters(run_dir))}


def unequal(found: dict, expected: dict) -> list[str]:
    """A line for each part that differs, with the first step that does."""
    lines = []
    for got, want in zip(found["losses"], expected["losses"], strict=False):
        if got != want:
            lines.append(f"losses: step {want[0]} gave {got}, not {want}")
            break
    if len(found["losses"]) != len(expected["losses"]):
        lines.append(f"losses: {len(found['losses'])} steps, not {len(expected['losses'])}")
    for name in sorted(found["samples"].keys() | expected["samples"].keys()):
        got, want = (side["samples"].get(name, []) for side in (found, expected))
        if got != want:
            first = next((w for g, w in zip(got, want, strict=False) if g != w), f"line {min(len(got), len(want)) + 1}")
            lines.append(f"samples: {name} differs at {first}")
    if found["parameters"] != expected["parameters"]:
        lines.append("parameters: another digest")
    return lines
