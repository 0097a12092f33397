"""Text for ``--explain KEY``: type, bounds, default and meaning of a key, or the keys of a section."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.credentials import redacted_values
from pipeline.errors import RequestError
from pipeline.recipe import schema
from pipeline.recipe.defaults import batch_rules
from pipeline.recipe.reading import load
from pipeline.recipe.yaml_text import one_line_yaml


def explain(key: str, *, recipe: dict[str, Any] | None = None) -> str:
    """The lines on a key such as "train.clip_norm", on a section, or with "" on all sections.

    recipe: a resolved one, whose value is shown beside the default. Raises RequestError for an unknown key.
    """
    path = _known_path([part for part in key.split(".") if part])
    node = schema.at(path)
    if schema.keys_of(node) or schema.holds_section(node):
        return "\n".join(_section(path, node))
    lines = [f"{'.'.join(path)}: {schema.type_text(node)}", f"  {node['description']}", f"  default: {default(path)}"]
    found, value = _value(recipe, path)
    if found:
        lines.append(f"  in this recipe: {one_line_yaml(value)}")
    return "\n".join(lines)


def explain_key(key: str, config: Path, overrides: list[str]) -> str:
    """``explain`` of a key, with its value in a recipe file if that can be read."""
    try:
        recipe = redacted_values(load(config, overrides).to_dict())
    except RequestError:
        recipe = None
    return explain(key, recipe=recipe)


def default(path: list[str]) -> str:
    """The default of a key in words."""
    node = schema.at(path)
    if "default" not in node:
        return "required"
    rule = batch_rules().get(".".join(path))
    return one_line_yaml(node["default"]) + (f", which follows the batch: {rule}" if rule else "")


def _known_path(parts: list[str]) -> list[str]:
    """The path with names and numbers that were left out filled in. Raises RequestError, naming the nearest key."""
    path: list[str] = []
    for part in parts:
        node = schema.at(path)
        held = schema.keys_of(schema.held_by(node))
        if part in held:
            path.append(schema.one_of(node))
        elif not held and part not in schema.keys_of(node):
            raise RequestError(f"--explain: {schema.unknown_key([*path, part])[0]}")
        path.append(part)
    return path


def _section(path: list[str], node: dict[str, Any]) -> list[str]:
    """A section's meaning, and a line on each of its keys."""
    if not schema.keys_of(node):
        path, node = [*path, schema.one_of(node)], schema.held_by(node)
    where = ".".join(path)
    lines = [f"{where}: {node['description']}" if where else node["description"]]
    for name, inner in schema.keys_of(node).items():
        lines.append(f"  {name}: {schema.type_text(inner)}")
        lines.append(f"      {inner['description']}")
    return lines


def _value(recipe: dict[str, Any] | None, path: list[str]) -> tuple[bool, Any]:
    """(whether the recipe has the path, its value there)."""
    node: Any = recipe
    for part in path:
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict) and part in node:
            node = node[part]
        else:
            return False, None
    return True, node
