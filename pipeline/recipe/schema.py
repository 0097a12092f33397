"""The recipe's JSON Schema, in which reading, ``--explain`` and the reference look up keys."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.recipe.settings import Recipe

# The part of a path in place of a name of the user's own.
NAME = "NAME"
# Maximum number of keys that may have been meant which a line names.
_MAX_SHOWN = 3


@functools.cache
def recipe_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a recipe file."""
    schema = _cleaned(Recipe.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Recipe"} | schema


def _cleaned(node: Any) -> Any:
    """Without titles, which repeat the names of keys, and with the first line of each docstring."""
    if isinstance(node, list):
        return [_cleaned(each) for each in node]
    if not isinstance(node, dict):
        return node
    out = {name: _cleaned(value) for name, value in node.items() if name != "title" or isinstance(value, dict)}
    if isinstance(out.get("description"), str):
        out["description"] = out["description"].partition("\n")[0]
    return out


def resolved(node: dict[str, Any]) -> dict[str, Any]:
    """A node with its references filled in; its own values take precedence."""
    name = node.get("$ref", "").rpartition("/")[2]
    return resolved(recipe_schema()["$defs"][name]) | node if name else node


def keys_of(node: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Key → node of a section; empty for anything else, such as a mapping of names."""
    return {name: resolved(inner) for name, inner in node.get("properties", {}).items()}


def at(path: Iterable[str]) -> dict[str, Any]:
    """The node at a path, in which names and numbers are the user's own; empty if there is none."""
    node = resolved(recipe_schema())
    for part in path:
        node = keys_of(node).get(part) or held_by(node)
    return node


def held_by(node: dict[str, Any]) -> dict[str, Any]:
    """The node of the values of a mapping of names or of a list."""
    for option in (node, *node.get("anyOf", ())):
        option = resolved(option)
        held = option.get("additionalProperties") or option.get("items")
        if isinstance(held, dict):
            return resolved(held)
    return {}


def sections(path: Sequence[str] = ()) -> Iterable[tuple[list[str], dict[str, Any]]]:
    """(path, node) of the recipe and of every section in it."""
    node = at(path)
    yield list(path), node
    for name, inner in keys_of(node).items():
        if keys_of(inner):
            yield from sections([*path, name])
        elif holds_section(inner):
            yield from sections([*path, name, one_of(inner)])


def holds_section(node: dict[str, Any]) -> bool:
    """Whether a node is a mapping of names to sections, or a list of them."""
    return bool(keys_of(held_by(node)))


def one_of(node: dict[str, Any]) -> str:
    """The part of a path in place of one entry of a mapping or a list."""
    return "0" if node.get("type") == "array" else NAME


def unknown_key(path: list[str]) -> tuple[str, list[str]]:
    """(what to say of an unknown key, the path of the key that was probably meant; empty if that is not clear)."""
    *outer, name = path
    known = list(keys_of(at(outer)))
    same = [[*section, name] for section, node in sections() if name in keys_of(node)]
    # A section that was left out comes first, then a misspelt name, then a key of that name in another section.
    found = [[*outer, *each[len(outer) :]] for each in same if _matches(outer, each)]
    found = found or [[*outer, each] for each in difflib.get_close_matches(name, known, n=1, cutoff=0.7)]
    found = found or same or [[*outer, each] for each in difflib.get_close_matches(name, known, n=1, cutoff=0.5)]
    key = ".".join(path)
    if not found:
        return f"unknown key {key!r}; known: {', '.join(known) or 'none, it has no keys'}", []
    meant = " or ".join(repr(".".join(each)) for each in found[:_MAX_SHOWN])
    return f"unknown key {key!r}; did you mean {meant}?", found[0] if len(found) == 1 else []


def _matches(outer: Sequence[str], path: Sequence[str]) -> bool:
    """Whether a path of ``sections`` begins with a path in which names and numbers are the user's own."""
    pairs = zip(outer, path, strict=False)
    return len(path) > len(outer) and all(theirs in (mine, NAME, "0") for mine, theirs in pairs)


def section_docs() -> dict[str, str]:
    """Section of a recipe → the line that says what it is."""
    top = keys_of(at(()))
    return {name: node["description"] for name, node in top.items() if keys_of(node) or holds_section(node)}


def type_text(node: dict[str, Any]) -> str:
    """The type of a key and its bounds in words."""
    *options, last = _options(node)
    return f"{', '.join(options)} or {last}" if options else last


def _options(node: dict[str, Any]) -> list[str]:
    """The types that a value may have, one after the other."""
    if "anyOf" in node:
        return [text for option in node["anyOf"] for text in _options(resolved(option))]
    if "enum" in node:
        return [str(value) for value in node["enum"]]
    if keys_of(node):
        return ["settings"]
    if "type" not in node:
        return ["any value"]
    if node["type"] == "object":
        return [f"{{name: {type_text(held_by(node))}}}"]
    if "prefixItems" in node:
        return [f"[{', '.join(type_text(resolved(item)) for item in node['prefixItems'])}]"]
    if node["type"] == "array":
        return [f"list of {type_text(resolved(node['items']))}"]
    return [" ".join([_KINDS[node["type"]], *_bounds(node)])]


_KINDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
_BOUNDS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}


def _bounds(node: dict[str, Any]) -> list[str]:
    return [f"{word} {node[name]:,.10g}" for name, word in _BOUNDS.items() if name in node]
