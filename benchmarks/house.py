"""Prints the measures of the source tree: files, functions, return types, circles, the cost of reading a recipe.

    python -m benchmarks.house

Bounds: 90 % of the files have at most 250 lines, none over 400; 90 % of the functions at most 20, none over 60; 95 %
of the functions of each room have a return type; modules import each other without circles; a recipe is read without
jax and ray, and a typo in one is answered within 1.5 s. Exits with 1 if one of them is not kept.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grimp

ROOT = Path(__file__).parent.parent
# Folders whose files and functions are measured; benchmarks and tests are left out.
SOURCES = ("model", "pipeline", "jobs")
MAX_FILE_LINES, P90_FILE_LINES = 400, 250
MAX_FUNCTION_LINES, P90_FUNCTION_LINES = 60, 20
MIN_ANNOTATED = 0.95
# Seconds within which a typo in a recipe is answered, on two cores.
MAX_TYPO_S = 1.5
# Packages that reading a recipe must not load.
HEAVY = ("jax", "flax", "optax", "orbax", "ray")


@dataclasses.dataclass(frozen=True)
class Function:
    """name: file, line and name, as an editor opens them. lines: from ``def`` to its end, without decorators."""

    name: str
    room: str
    lines: int
    annotated: bool
    public: bool
    documented: bool


def source_files() -> list[Path]:
    """Every Python file of the rooms, sorted."""
    return sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py"))


def functions(path: Path) -> Iterator[Function]:
    """All functions of a file, methods and nested ones too."""
    relative = path.relative_to(ROOT)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield Function(
                name=f"{relative}:{node.lineno} {node.name}",
                room=relative.parts[0] if len(relative.parts) < 3 else "/".join(relative.parts[:2]),
                lines=node.end_lineno - node.lineno + 1,
                # The return type of a constructor says nothing.
                annotated=node.returns is not None or node.name == "__init__",
                public=not node.name.startswith("_"),
                documented=ast.get_docstring(node) is not None,
            )


def percentile(values: list[int], share: float) -> int:
    """The smallest value that at least ``share`` of the values do not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def percentiles(values: list[int]) -> str:
    shown = ", ".join(f"p{round(100 * share)} {percentile(values, share)}" for share in (0.5, 0.9, 0.99))
    return f"{shown}, longest {max(values)}"


def circles() -> list[str]:
    """Modules that import each other, over any number of steps; one line for each circle."""
    graph = grimp.build_graph("model", "pipeline", cache_dir=None)
    above = {name: graph.find_upstream_modules(name) for name in graph.modules}
    return sorted(
        {
            " ↔ ".join(sorted({name, *(other for other in above[name] if name in above[other])}))
            for name in graph.modules
            if any(name in above[other] for other in above[name])
        }
    )


def loaded_by_recipe() -> list[str]:
    """Packages of ``HEAVY`` that a new interpreter has loaded after it has read the demo's recipe."""
    code = (
        "import sys; from pathlib import Path; from pipeline import recipe; recipe.load(Path('configs/demo.yaml')); "
        f"print(*(name for name in {HEAVY!r} if name in sys.modules))"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()


def typo_s() -> float:
    """Seconds from the command to the line that names the typo; the shortest of three."""
    command = [sys.executable, "jobs/pretrain.py", "--set", "train.num_step=3"]
    found = []
    for _ in range(3):
        begin = time.perf_counter()
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        found.append(time.perf_counter() - begin)
        assert answer.returncode == 2 and "num_steps" in answer.stderr, answer.stderr
    return min(found)


def problems_of_sizes() -> Iterator[str]:
    """A line for each bound on files, functions and return types that is not kept; prints the figures."""
    files = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in source_files()}
    found = [function for path in files for function in functions(path)]
    lines, lengths = list(files.values()), [function.lines for function in found]
    print(f"files: {len(files)}, {sum(lines):,} lines; {percentiles(lines)}")
    print(f"functions: {len(found)}; {percentiles(lengths)} lines")
    if percentile(lines, 0.9) > P90_FILE_LINES:
        yield f"more than a tenth of the files have over {P90_FILE_LINES} lines"
    if percentile(lengths, 0.9) > P90_FUNCTION_LINES:
        yield f"more than a tenth of the functions have over {P90_FUNCTION_LINES} lines"
    yield from (f"{path.relative_to(ROOT)} has {n} lines" for path, n in files.items() if n > MAX_FILE_LINES)
    yield from (f"{f.name} has {f.lines} lines" for f in found if f.lines > MAX_FUNCTION_LINES)
    for room in sorted({f.room for f in found}):
        mine = [f for f in found if f.room == room]
        annotated = sum(f.annotated for f in mine) / len(mine)
        public = [f for f in mine if f.public] or mine
        documented = sum(f.documented for f in public) / len(public)
        print(
            f"  {room}: {len(mine)} functions, return types {annotated:.1%}, docstrings of public ones {documented:.0%}"
        )
        if annotated < MIN_ANNOTATED:
            yield f"{room}: {annotated:.1%} of the functions have a return type"


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    problems = list(problems_of_sizes())
    found = circles()
    print(f"circles: {len(found)}")
    problems += found
    heavy = loaded_by_recipe()
    print(f"packages loaded to read a recipe, of {', '.join(HEAVY)}: {', '.join(heavy) or 'none'}")
    problems += [f"reading a recipe loads {name}" for name in heavy]
    seconds = typo_s()
    print(f"a typo in a recipe is answered after {seconds:.2f} s")
    if seconds > MAX_TYPO_S:
        problems.append(f"a typo in a recipe is answered after {seconds:.2f} s")
    for line in problems:
        print(f"NOT KEPT: {line}")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
