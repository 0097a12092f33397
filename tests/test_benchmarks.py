"""The benchmarks are modules, run from the repository's root."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_every_benchmark_that_a_document_names_exists_and_needs_no_change_of_the_path():
    modules = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py")}
    named = {
        name
        for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
        for name in re.findall(r"python -m benchmarks\.(\w+)", page.read_text(encoding="utf-8"))
    }
    assert named and named <= set(modules)
    assert not [name for name, text in modules.items() if "sys.path" in text]
    said = {name: re.findall(r"python -m benchmarks\.(\w+)", text) for name, text in modules.items()}
    assert all(set(names) <= {name} for name, names in said.items()), said
