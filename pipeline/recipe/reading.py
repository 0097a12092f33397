"""From a YAML file and overrides to a checked recipe, or one clear line that says what is wrong."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import pydantic
import yaml

from pipeline.errors import RequestError
from pipeline.recipe.checks import check_model, check_references
from pipeline.recipe.defaults import with_batch_defaults, with_data_values, with_model_values
from pipeline.recipe.settings import Recipe
from pipeline.recipe.yaml_text import read_yaml


def load(path: Path, overrides: list[str] = (), *, run_dir: Path | None = None) -> Recipe:
    """Reads a recipe and applies KEY=VALUE overrides (VALUE is YAML). Raises RequestError with one clear line.

    run_dir: of the run that may go on: what the recipe leaves open is what it is there, whatever tasks come or go.
    """
    try:
        raw = read_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise RequestError(f"--config {path}: no such file") from e
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as e:
        raise RequestError(f"--config {path}: expected YAML: {' '.join(str(e).split())}") from e
    if not isinstance(raw, dict):
        raise RequestError(f"--config {path}: expected a mapping of settings, found {type(raw).__name__}")
    for text in overrides:
        _override(raw, text)
    return from_dict(raw, stored=_stored(run_dir) if run_dir else None)


def _stored(run_dir: Path) -> dict:
    """The resolved recipe of a run; empty where there is none, or none that can be read, which its check will say."""
    try:
        stored = read_yaml((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _override(raw: dict, text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals:
        raise RequestError(f"--set {text}: expected KEY=VALUE, e.g. --set train.num_steps=100")
    try:
        parsed = read_yaml(value)
    except yaml.YAMLError as e:
        raise RequestError(f"--set {text}: the value is not YAML: {' '.join(str(e).split())}") from e
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

    stored: the resolved recipe of a run that goes on (``defaults.with_batch_defaults``).
    """
    try:
        recipe = with_batch_defaults(Recipe.model_validate(_with_class_files(raw)), stored=stored or {})
    except pydantic.ValidationError as e:
        raise RequestError(_message(e)) from e
    check_references(recipe)
    check_model(recipe)
    return with_model_values(with_data_values(recipe))


def _with_class_files(raw: dict) -> dict:
    """Class lists that name a file are read into the recipe, so that the resolved config holds them."""
    sets = raw.get("data_sets")
    if not isinstance(sets, dict):
        return raw
    out = {}
    for name, settings in sets.items():
        if isinstance(settings, dict) and isinstance(settings.get("classes"), str):
            path = Path(settings["classes"]).expanduser()
            try:
                lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
            except (OSError, UnicodeDecodeError) as e:
                reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8 text"
                raise RequestError(f"data_sets.{name}.classes: {path} cannot be read: {reason}") from e
            settings = settings | {"classes": [line for line in lines if line]}
        out[name] = settings
    return raw | {"data_sets": out}


def _message(error: pydantic.ValidationError) -> str:
    """The first error in words; an unknown key comes first, since a key that is missing may be the one misspelt."""
    errors = error.errors()
    unknown = [e for e in errors if e["type"] == "extra_forbidden"]
    first = (unknown or errors)[0]
    # Of a setting that may be of several types, pydantic adds the name of the type to the path.
    path = [str(part) for part in first["loc"] if str(part).partition("[")[0] not in ("str", "dict", "list")]
    if first["type"] == "extra_forbidden":
        text, meant = _unknown_key(path)
        errors = [e for e in errors if e["type"] != "missing" or [str(part) for part in e["loc"]] != meant]
    elif first["type"] == "missing":
        text = f"missing key {'.'.join(path)!r}"
    elif first["type"] in ("model_type", "dict_type"):
        text = f"{'.'.join(path)}: expected {_expected_mapping(path)}, found {_shown(first['input'])}"
    else:
        text = f"{'.'.join(path)}: {first['msg']}; found {_shown(first['input'])}"
    return text + (f" (and {len(errors) - 1} more)" if len(errors) > 1 else "")


def _unknown_key(path: list[str]) -> tuple[str, list[str]]:
    """(the line, the path of the key that was meant where one is near)."""
    known, key = _known_keys(path[:-1]), ".".join(path)
    nearest = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
    if nearest:
        meant = [*path[:-1], nearest[0]]
        return f"unknown key {key!r}; did you mean {'.'.join(meant)!r}?", meant
    return f"unknown key {key!r}; known: {', '.join(known)}", []


def _expected_mapping(path: list[str]) -> str:
    """The settings that belong where something else than a mapping was found."""
    fields = _schema(path)
    inner = path if fields else [*path, "NAME"]
    fields = fields or _schema(inner)
    required = [name for name, field in fields.items() if field.is_required()]
    names = (required or list(fields))[:1]
    return f"settings such as {'.'.join([*inner, *names])}=..." if names else "a mapping"


def _shown(value: Any) -> str:
    return repr(value)[:80]


def _known_keys(path: list[str]) -> list[str]:
    """The keys of the mapping at ``path`` in the recipe's schema."""
    return list(_schema(path))


def _schema(path: list[str]) -> dict[str, Any]:
    """Key → field of the settings at ``path``; empty where there are none, as in a mapping of names."""
    node: Any = Recipe
    for part in path:
        if _is_settings(node):
            node = next(f for name, f in node.model_fields.items() if part in (name, f.alias)).annotation
            continue
        # A dict or list of models: the part is a name or a number; its last argument is what it holds.
        node = next((a for a in reversed(getattr(node, "__args__", ())) if a is not type(None)), None)
    return {field.alias or name: field for name, field in node.model_fields.items()} if _is_settings(node) else {}


def _is_settings(node: Any) -> bool:
    return isinstance(node, type) and issubclass(node, pydantic.BaseModel)
