"""From a YAML file and overrides to a checked recipe, or one clear line that says what is wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pydantic
import yaml

from pipeline.data.spec import AUDIO_PRESETS, AudioSettings
from pipeline.errors import RequestError, one_line
from pipeline.recipe import schema
from pipeline.recipe.checks import check_model, check_references
from pipeline.recipe.defaults import with_batch_defaults, with_data_values, with_model_values
from pipeline.recipe.settings import Recipe
from pipeline.recipe.task_settings import EvaluationSettings
from pipeline.recipe.yaml_text import read_yaml
from pipeline.store.objects import StoreError
from pipeline.store.path import user_path


def load(path: Path, overrides: list[str] = (), *, run_dir: Path | None = None) -> Recipe:
    """Reads a recipe and applies KEY=VALUE overrides (VALUE is YAML). Raises RequestError with one clear line.

    run_dir: of a run to resume: its values fill in what the recipe leaves open, even if tasks come or go.
    """
    try:
        raw = read_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise RequestError(f"--config {path}: no such file") from e
    except IsADirectoryError as e:
        raise RequestError(f"--config {path}: expected a YAML file, found a folder") from e
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as e:
        raise RequestError(f"--config {path}: expected YAML: {one_line(e)}") from e
    if not isinstance(raw, dict):
        raise RequestError(f"--config {path}: expected a mapping of settings, found {type(raw).__name__}")
    for text in overrides:
        _override(raw, text)
    return from_dict(raw, stored=_stored(run_dir) if run_dir else None)


def _stored(run_dir: Path) -> dict:
    """The resolved recipe of a run; empty if it cannot be read, which the check of the run directory reports."""
    try:
        stored = read_yaml((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except StoreError:
        raise
    except (yaml.YAMLError, UnicodeDecodeError, OSError):
        return {}
    return stored if isinstance(stored, dict) else {}


def key_value(text: str) -> tuple[str, Any]:
    """The two parts of a ``--set KEY=VALUE``. Raises RequestError if the value is not YAML."""
    key, equals, value = text.partition("=")
    if not equals:
        raise RequestError(f"--set {text}: expected KEY=VALUE, e.g. --set train.num_steps=100")
    try:
        return key, read_yaml(value)
    except yaml.YAMLError as e:
        raise RequestError(f"--set {text}: the value is not YAML: {one_line(e)}") from e


def _override(raw: dict, text: str) -> None:
    key, parsed = key_value(text)
    *outer, last = key.split(".")
    node = raw
    for part in outer:
        node = node.setdefault(part, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise RequestError(f"--set {text}: {part!r} is not a mapping in this recipe")
    node[last] = parsed


def from_dict(raw: dict, *, stored: dict | None = None) -> Recipe:
    """A checked recipe in which nothing is left open that follows from the rest. Raises RequestError for the first
    thing that is wrong.

    stored: the resolved recipe of a run to resume (``defaults.with_batch_defaults``).
    """
    try:
        _check_plain(raw)
    except RecursionError as e:
        raise RequestError("the recipe: a YAML alias refers to a value that contains it; write it out") from e
    filled = _with_each_evaluation(_with_each_data_set(raw))
    try:
        # As JSON, strict settings take lists for tuples and mappings for dataclasses, and nothing else.
        recipe = with_batch_defaults(Recipe.model_validate_json(json.dumps(filled)), stored=stored or {})
    except pydantic.ValidationError as e:
        raise RequestError(_message(e)) from e
    check_references(recipe)
    check_model(recipe)
    return with_model_values(with_data_values(recipe))


def _check_plain(value: Any, path: str = "") -> None:
    """Raises RequestError for YAML that a recipe cannot hold: dates, bytes, sets, keys that are not text."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise RequestError(f"{path or 'the recipe'}: expected keys that are text, found {name!r}; quote it")
            _check_plain(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _check_plain(inner, f"{path}.{number}")
    elif not isinstance(value, str | int | float | None):
        raise RequestError(f"{path}: expected text, a number, a list or a mapping, found {_shown(value)}; quote text")
    elif isinstance(value, str) and not value.isascii() and value != value.encode(errors="replace").decode():
        raise RequestError(f"{path}: expected text, found half a character in {_shown(value)}")


def _with_each_data_set(raw: dict) -> dict:
    """The recipe with class lists and audio presets filled in, so that the resolved config holds their values."""
    sets = raw.get("data_sets")
    if not isinstance(sets, dict):
        return raw
    out = dict(sets)
    for name, settings in sets.items():
        if isinstance(settings, dict):
            lists = with_lists(settings, f"data_sets.{name}", ("classes",))
            out[name] = lists | _preset(settings.get("audio"))
    return raw | {"data_sets": out}


def _with_each_evaluation(raw: dict) -> dict:
    """The recipe with the classes and prompts that its evaluations read from files."""
    entries = raw.get("evaluate")
    if not isinstance(entries, list):
        return raw
    filled = [with_lists(e, f"evaluate.{i}") if isinstance(e, dict) else e for i, e in enumerate(entries)]
    return raw | {"evaluate": filled}


def with_lists(settings: dict, where: str, keys: tuple[str, ...] = ("classes", "prompts")) -> dict:
    """Settings with the lines of each file that some keys name in place of a list.

    Raises RequestError if a file cannot be read or is empty.
    """
    return settings | {key: _lines(settings[key], f"{where}.{key}") for key in keys if type(settings.get(key)) is str}


def _lines(file: str, where: str) -> list[str]:
    path = user_path(file)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8 text"
        raise RequestError(f"{where}: {path} cannot be read: {reason}") from e
    if not any(lines):
        raise RequestError(f"{where}: {path}: expected one on each line, found none")
    return [line for line in lines if line]


def evaluation_settings(raw: dict) -> EvaluationSettings:
    """One measurement that a user asks for outside of a recipe. Raises RequestError with one clear line."""
    raw = with_lists(raw, "evaluate")
    try:
        return EvaluationSettings.model_validate_json(json.dumps(raw))
    except pydantic.ValidationError as e:
        within = ("evaluate", "0")
        raise RequestError(_message(e, within=within).replace(f"{'.'.join(within)}.", "")) from e


def _preset(audio: Any) -> dict:
    """The values of an audio preset for the keys that are not given; the key's own check refuses an unknown one."""
    if not isinstance(audio, dict) or audio.get("preset") not in list(AUDIO_PRESETS):
        return {}
    values = AUDIO_PRESETS[audio["preset"]]
    return {"audio": {f.name: getattr(values, f.name) for f in dataclasses.fields(AudioSettings)} | audio}


# Errors of pydantic: an unknown key; a value in place of a section or a mapping.
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_NO_MAPPING = ("model_type", "dataclass_type", "dict_type")
# Names that pydantic adds to the path of a value that may be of several types.
_TYPES = ("str", "dict", "list", "int", "tuple", "literal")


def _message(error: pydantic.ValidationError, *, within: tuple[str, ...] = ()) -> str:
    """The first error in words; an unknown key comes first, since a key that is missing may be the one misspelt.

    within: path of the part of a recipe that was validated.
    """
    errors = error.errors()
    unknown = [e for e in errors if e["type"] in _UNKNOWN]
    first = (unknown or errors)[0]
    path = [*within, *(str(part) for part in first["loc"] if str(part).partition("[")[0] not in _TYPES)]
    where = ".".join(path)
    if first["type"] in _UNKNOWN:
        text, meant = schema.unknown_key(path)
        errors = [e for e in errors if e["type"] != "missing" or [str(part) for part in e["loc"]] != meant]
    elif first["type"] == "missing":
        text = f"missing key {where!r}"
    elif first["type"] in _NO_MAPPING:
        text = f"{where}: expected {_expected_mapping(path)}, found {_shown(first['input'])}"
    elif first["type"] == "value_error":
        # Of a dataclass that checks its values together, and names them.
        text = f"{where}: {first['ctx']['error']}"
    else:
        text = f"{where}: {first['msg']}; found {_shown(first['input'])}"
    return text + (f" (and {len(errors) - 1} more)" if len(errors) > 1 else "")


def _expected_mapping(path: list[str]) -> str:
    """The mapping that belongs in place of another value, in words."""
    node = schema.at(path)
    inner = path if schema.keys_of(node) else [*path, schema.one_of(node)]
    node = schema.at(inner)
    names = (node.get("required") or list(schema.keys_of(node)))[:1]
    return f"settings such as {'.'.join([*inner, *names])}=..." if names else "a mapping"


def _shown(value: Any) -> str:
    return repr(value)[:80]
