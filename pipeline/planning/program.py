"""What a compiled program holds, read from its text: cycles, by scope, and collectives; FLOPs, from its trace."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from typing import Any

import jax
import jax.extend.core

# Kinds of collectives, by the opcodes that begin them.
_COLLECTIVES = ("all-to-all", "all-reduce", "all-gather", "reduce-scatter", "collective-permute")
# Named scopes of the model, the innermost of which counts.
_SCOPES = ("attention", "router", "dispatch", "combine", "experts", "mlp", "norm", "embed", "heads", "optimizer")

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)')
_KERNEL = 'custom_call_target="tpu_custom_call"'
_SCOPE = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass
class Program:
    """Sums over one run of a program on one device.

    cycles: the compiler's estimates, 0 if it gives none; collectives are not in them. scopes: cycles by named scope.
    collectives: kind → [number, bytes of the results]. gathers: values of an array that a device gathers → bytes of
    all gathers of that size. unknown_loops: loops whose number of rounds the text does not tell, counted once.
    kernels: of which the compiler has no estimate.
    """

    cycles: float = 0.0
    scopes: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    collectives: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    gathers: dict[int, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    unknown_loops: int = 0
    kernels: list[Kernel] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of our own in a program. name: its instruction; kind: its name in the source. dims: of its result, or
    of its first one. times: of its runs."""

    name: str
    kind: str
    dims: tuple[int, ...]
    times: float


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    line: str


def read_program(text: str) -> Program:
    """Reads the text of a compiled program, as ``jax.stages.Compiled.as_text`` gives it."""
    computations, entry = _computations(text)
    program = Program()
    _walk(entry, 1.0, computations, program, inside_fusion=False)
    program.scopes, program.gathers = dict(program.scopes), dict(program.gathers)
    return program


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] = []
    entry = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations[head[1]] = []
            entry = head[1] if line.startswith("ENTRY") else entry
        elif found := _INSTRUCTION.match(line):
            current.append(_Instruction(found[1], found[2], found[3], line))
    return computations, entry


def _walk(name: str, times: float, computations: dict, program: Program, *, inside_fusion: bool) -> None:
    for instruction in computations.get(name, ()):
        _count(instruction, times, program, inside_fusion=inside_fusion)
        rounds = times
        if instruction.opcode == "while":
            trips = _trips(instruction, computations)
            program.unknown_loops += trips is None
            rounds *= trips or 1
        elif instruction.opcode in ("reduce", "sort", "scatter", "map", "select-and-scatter", "reduce-window"):
            continue
        fused = inside_fusion or instruction.opcode == "fusion"
        for called in _called(instruction.line):
            _walk(called, rounds, computations, program, inside_fusion=fused)


def _called(line: str) -> list[str]:
    branches = _BRANCHES.search(line)
    more = [] if branches is None else [name.strip().lstrip("%") for name in branches[1].split(",")]
    return [*_CALLED.findall(line), *more]


def _count(instruction: _Instruction, times: float, program: Program, *, inside_fusion: bool) -> None:
    kind = instruction.opcode.removesuffix("-start")
    if kind in _COLLECTIVES:
        entry = program.collectives.setdefault(kind, [0, 0])
        entry[0] += times
        arrays = _results(instruction)
        entry[1] += times * sum(size for _, size in arrays)
        if kind == "all-gather":
            for values, size in arrays:
                program.gathers[values] += times * size
        return
    if instruction.opcode == "custom-call" and _KERNEL in instruction.line:
        dims = tuple(int(n) for n in _ARRAY.findall(instruction.shape)[0][1].split(",") if n)
        program.kernels.append(Kernel(instruction.name, instruction.name.split(".")[0], dims, times))
        return
    # A fusion's estimate holds for all that is in it.
    found = None if inside_fusion else _CYCLES.search(instruction.line)
    if found:
        cycles = times * int(found[1])
        program.cycles += cycles
        program.scopes[_scope(instruction.line)] += cycles


def _scope(line: str) -> str:
    found = _SCOPE.search(line)
    parts = re.split(r"[/()]", found[1]) if found else []
    return next((part for part in reversed(parts) if part in _SCOPES), "other")


def _results(instruction: _Instruction) -> list[tuple[int, int]]:
    """(values, bytes) of each array of a collective's result."""
    found = []
    for kind, dimensions in _ARRAY.findall(instruction.shape):
        width = 1 if kind == "pred" else max(1, int(re.sub(r"\D.*", "", re.sub(r"^\D+", "", kind))) // 8)
        values = math.prod(int(n) for n in dimensions.split(",") if n)
        found.append((values, width * values))
    if instruction.opcode == "all-gather-start":
        # The operands, then the results.
        return found[len(found) // 2 :]
    # Of another one that is still on its way, the array that is not an operand or a flag.
    return [max(found)] if found and instruction.opcode.endswith("-start") else found


def _trips(loop: _Instruction, computations: dict) -> int | None:
    """Rounds of a loop: as the compiler knows them, or the one constant that its condition compares with."""
    if known := _TRIPS.search(loop.line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.line)
    names = [condition[1]] if condition else []
    constants = []
    for name in names:
        for instruction in computations.get(name, ()):
            constants += [int(n) for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", instruction.line)]
            names += [] if instruction.opcode != "fusion" else _called(instruction.line)
    return constants[0] if len(constants) == 1 else None


def traced_flops(jaxpr: Any) -> float:
    """FLOPs of the matrix products of a traced step on all devices together, two a multiply-add.

    Loops count as often as they run, and what is computed a second time to save memory counts twice.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return float(sum(_equation_flops(equation) for equation in jaxpr.eqns))


def _equation_flops(equation: Any) -> float:
    name = equation.primitive.name
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left, out = equation.invars[0].aval, equation.outvars[0].aval
        return 2.0 * math.prod(out.shape) * math.prod(left.shape[axis] for axis in contracted)
    times = {"scan": equation.params.get("length", 1), "shard_map": getattr(equation.params.get("mesh"), "size", 1)}
    if name == "pallas_call":
        times[name] = math.prod(equation.params["grid_mapping"].grid)
    inner = [traced_flops(j) for j in _inner(equation.params)]
    return times.get(name, 1) * (max(inner, default=0.0) if name == "cond" else sum(inner))


def _inner(params: dict) -> list[Any]:
    values = [v for value in params.values() for v in (value if isinstance(value, tuple | list) else (value,))]
    return [v for v in values if isinstance(v, jax.extend.core.ClosedJaxpr | jax.extend.core.Jaxpr)]
