"""YAML as recipes use it: numbers such as 5e-4 are numbers, and what is written reads back the same."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

from pipeline.recipe.schema import section_docs

_WIDTH = 118
_HEADER = "# A resolved recipe: every setting with its value. Their meanings: docs/settings.md\n"


class _Loader(yaml.SafeLoader):
    """Reads 5e-4, text to YAML 1.1, as the number it is to people, and refuses a mapping with one key twice."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # Checked before merge keys ("<<") are filled in: a key may replace a merged one.
        _check_keys(node)
        super().flatten_mapping(node)


def _check_keys(node: yaml.MappingNode) -> None:
    """Raises YAMLError for a duplicate key, of which YAML would silently take the last."""
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        line, name = key.start_mark.line + 1, (key.tag, str(key.value))
        if name in lines:
            raise yaml.YAMLError(f"found the key {key.value!r} on line {line} and on line {lines[name]}; remove one")
        lines[name] = line


class _Dumper(yaml.SafeDumper):
    """Quotes text that ``_Loader`` would read as a number, and writes no aliases."""

    def ignore_aliases(self, data) -> bool:
        return True


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
    )


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    # Of YAML's styles only this one holds a line break on one line.
    style = None if text.splitlines() == [text] else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def read_yaml(text: str) -> Any:
    """The value of a YAML document. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def dump(recipe: dict) -> str:
    """A resolved recipe as text that reads well, compares line by line and loads to the same again."""
    docs, parts = section_docs(), [_HEADER]
    for name, value in recipe.items():
        comment = f"# {docs[name]}\n" if name in docs else ""
        parts.append("\n" + comment + "\n".join(_entry(name, value)) + "\n")
    return "".join(parts)


def _entry(name: str, value) -> Iterator[str]:
    """A section, or a task or data set in one: a line a setting."""
    if not value or not isinstance(value, dict | list):
        yield from _setting(f"{one_line_yaml(name)}: ", value)
        return
    yield f"{one_line_yaml(name)}:"
    if isinstance(value, list):
        for item in value:
            yield from _setting("  - ", item)
    elif all(isinstance(inner, dict) for inner in value.values()):
        for key, inner in value.items():
            yield from ("  " + line for line in _entry(key, inner))
    else:
        for key, inner in value.items():
            yield from _setting(f"  {one_line_yaml(key)}: ", inner)


def _setting(head: str, value) -> Iterator[str]:
    """One line, or where that would be too long several, broken between the entries of collections."""
    if not isinstance(value, dict | list):
        yield head + one_line_yaml(value, inside=False)
        return
    line, indent = head, " " * (len(head) - len(head.lstrip()) + 2)
    for number, piece in enumerate(_pieces(value)):
        more = f" {piece}" if number else piece
        if number and len(line) + len(more) > _WIDTH:
            yield line
            line, more = indent, piece
        line += more
    yield line


def _pieces(value: dict | list) -> list[str]:
    """The text of a collection, cut where a line may end: after its entries, and inside those that fill a line."""
    named, parts = isinstance(value, dict), []
    for name, inner in value.items() if named else (("", each) for each in value):
        name = f"{one_line_yaml(name)}: " if named else ""
        text = name + one_line_yaml(inner)
        if isinstance(inner, dict | list) and len(text) > _WIDTH * 0.9:
            first, *rest = _pieces(inner)
            parts.append([name + first, *rest])
        else:
            parts.append([text])
    for part in parts[:-1]:
        part[-1] += ","
    pieces = [piece for part in parts for piece in part] or [""]
    pieces[0] = ("{" if named else "[") + pieces[0]
    pieces[-1] += "}" if named else "]"
    return pieces


def one_line_yaml(value, *, inside: bool = True) -> str:
    """A value as YAML. inside: quoted as an entry of a list on one line needs it."""
    text = yaml.dump(
        [value] if inside else {"a": value},
        Dumper=_Dumper,
        default_flow_style=inside,
        width=math.inf,
        sort_keys=False,
        allow_unicode=True,
    )
    return text[1:-2] if inside else text[len("a: ") : -1]
