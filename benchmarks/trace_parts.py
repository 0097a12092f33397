"""The share of each part of the model in a compiled step's time, from a trace of jax.profiler; for ``model_step.py``.

An operation belongs to the part whose ``jax.named_scope`` is in its metadata. What XLA fused counts as its last
operation, which blurs the borders a little. Control flow is left out: only what runs inside it counts.
"""

from __future__ import annotations

import collections
import gzip
import json
import re
import tempfile
from pathlib import Path

import jax

PARTS = {
    "attention": "attention",
    "mlp": "feed-forward",
    "norm": "norms",
    "optimizer": "optimizer",
    "heads": "heads and embedding",
    "embed": "heads and embedding",
    "router": "router",
    "dispatch": "dispatch",
    "experts": "experts",
    "combine": "combine",
}
_SCOPE = re.compile(rf"(?:^|[/(])({'|'.join(PARTS)})(?=[/)]|$)")
_OPERATION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = ")
_METADATA = re.compile(r'op_name="([^"]*)"')
_CONTROL_FLOW = ("while", "call", "conditional")


def time_by_part(executable: jax.stages.Compiled, run, *, calls: int, longest: int = 0) -> dict:
    """Share of the time of all operations of ``executable`` in ``calls`` calls of ``run``, by part, largest first.

    longest: the number of operations to name, those that take the most time. ms: of one call, on the device. traced:
    time of all operations over the time from the first to the last; on CPUs operations can overlap.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run(calls)
        paths = list(Path(folder).rglob("*.trace.json.gz"))
        events = [e for path in paths for e in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
    text = executable.as_text()
    events = _operations(events, module=re.match(r"HloModule ([\w.\-]+)", text)[1])
    if not events:
        return {"failed": "the trace names no operations of the step"}
    names = _op_names(text)
    by_operation, total = collections.Counter(), collections.Counter()
    for event in events:
        by_operation[event["args"]["hlo_op"]] += event["dur"]
    for operation, time in by_operation.items():
        total[part_of(operation, names)] += time
    spent = sum(total.values())
    span = max(e["ts"] + e["dur"] for e in events) - min(e["ts"] for e in events)
    slowest = {f"{op} {names.get(op, '')[-110:]}": time / spent for op, time in by_operation.most_common(longest)}
    return ({"longest": slowest} if longest else {}) | {
        "share": {part: time / spent for part, time in total.most_common()},
        "ms": span / calls / 1000,
        "traced": spent / span,
    }


def _operations(events: list[dict], *, module: str) -> list[dict]:
    """The events that are operations of a module. GPUs list them again in lines derived from their streams."""
    streams = {
        (e["pid"], e.get("tid"))
        for e in events
        if e.get("name") == "thread_name" and e["args"]["name"].startswith("Stream")
    }
    found = [
        e
        for e in events
        if e.get("args", {}).get("hlo_module") == module
        and "hlo_op" in e["args"]
        and "dur" in e
        and not e["args"]["hlo_op"].startswith(_CONTROL_FLOW)
    ]
    return [e for e in found if (e["pid"], e["tid"]) in streams] or found


def _op_names(text: str) -> dict[str, str]:
    """Operation → its metadata's op_name, of a compiled module's text."""
    names = {}
    for line in text.splitlines():
        operation, metadata = _OPERATION.match(line), _METADATA.search(line)
        if operation:
            names[operation[1]] = metadata[1] if metadata else ""
    return names


def part_of(operation: str, names: dict[str, str]) -> str:
    op_name = names.get(operation, "")
    scope = _SCOPE.search(op_name)
    if scope:
        return PARTS[scope[1]]
    if "dynamic_slice" in op_name or "dynamic_update_slice" in op_name:
        return "into and out of stacks of layers"
    if "copy" in operation or "broadcast" in operation:
        return "copies and zeros"
    return "other"
