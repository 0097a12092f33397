"""Writes docs/settings.md and configs/recipe.schema.json: ``python -m pipeline.recipe.reference``.

Both come from the recipe's keys alone; a test compares them with what is committed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.files import write_bytes
from pipeline.recipe import schema
from pipeline.recipe.explain import default

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "python -m pipeline.recipe.reference"

_HEAD = f"""\
# Settings

Every key of a recipe. Written by `{COMMAND}`; do not edit it by hand.

* `NAME` is a name of your own; `0` is the number of an entry of a list.
* `python jobs/pretrain.py --explain train.clip_norm` says the same of one key, and its value in a recipe;
  `--print-config` prints all values.
* Editors with a YAML language server complete and check recipes that begin with a line like that of
  [configs/demo.yaml](../configs/demo.yaml).
"""


def settings_page() -> str:
    """The text of docs/settings.md: a table for each section."""
    parts = [_HEAD]
    for path, node in schema.sections():
        rows = [_row(path, name, inner) for name, inner in schema.keys_of(node).items()]
        title = f"`{'.'.join(path)}`" if path else "Top level"
        table = "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows])
        parts.append(f"## {title}\n\n{node['description']}\n\n{table}\n")
    return "\n".join(parts)


def _row(path: list[str], name: str, node: dict[str, Any]) -> str:
    if schema.keys_of(node) or schema.holds_section(node):
        inner = [*path, name] if schema.keys_of(node) else [*path, name, schema.one_of(node)]
        kind = f"[{'.'.join(inner)}](#{''.join(inner).lower()})"
        given = "" if "default" in node else "required"
    else:
        kind, given = schema.type_text(node), default([*path, name])
    return f"| `{name}` | {kind} | {given} | {node['description']} |".replace("\n", " ")


def schema_text() -> str:
    """The text of configs/recipe.schema.json."""
    return json.dumps(schema.recipe_schema(), indent=1, ensure_ascii=False) + "\n"


def pages() -> dict[Path, str]:
    """Generated file → its text."""
    return {ROOT / "docs" / "settings.md": settings_page(), ROOT / "configs" / "recipe.schema.json": schema_text()}


if __name__ == "__main__":
    for file, text in pages().items():
        write_bytes(file, text.encode())
        print(file.relative_to(ROOT))
