"""YAML as recipes are written in: numbers read alike by people, by us and by what we write."""

from __future__ import annotations

import re

import yaml


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 5e-4 as text, YAML 1.2 and people as a number."""


class _Dumper(yaml.SafeDumper):
    """Quotes the text that ``_Loader`` would read as a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
    )


def read_yaml(text: str):
    """The value of a YAML document. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def dump(recipe: dict) -> str:
    return yaml.dump(recipe, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
