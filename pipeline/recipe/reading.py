"""From a YAML file and overrides to a checked recipe, or one clear line that says what is wrong."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import pydantic
import yaml

from pipeline.errors import RequestError
from pipeline.recipe.checks import check_model, check_references
from pipeline.recipe.defaults import with_batch_defaults, with_model_values
from pipeline.recipe.settings import Recipe
from pipeline.recipe.text import read_yaml


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
    return with_model_values(recipe)


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
    errors = error.errors()
    first = errors[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        nearest = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*path[:-1], nearest[0]])!r}?" if nearest else f"known: {', '.join(known)}"
        return f"unknown key {key!r}; {hint}{more}"
    if first["type"] == "missing":
        return f"missing key {key!r}{more}"
    found = repr(first["input"])[:80]
    return f"{key}: {first['msg']}; found {found}{more}"


def _known_keys(path: list[str]) -> list[str]:
    """The keys of the mapping at ``path`` in the recipe's schema."""
    node: Any = Recipe
    for part in path:
        if isinstance(node, type) and issubclass(node, pydantic.BaseModel):
            node = next(f for name, f in node.model_fields.items() if part in (name, f.alias)).annotation
            continue
        # A dict or list of models: the part is a name or a number; its last argument is what it holds.
        node = [a for a in getattr(node, "__args__", ()) if a is not type(None)][-1]
    while not (isinstance(node, type) and issubclass(node, pydantic.BaseModel)):
        inner = [a for a in getattr(node, "__args__", ()) if a is not type(None)]
        if not inner:
            return []
        node = inner[-1]
    return [field.alias or name for name, field in node.model_fields.items()]
