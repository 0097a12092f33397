"""config.json of an exported model: its values as dataclasses, checked one by one when they are read."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any

from model import terms
from model.config import ModelConfig, MoEConfig, PatchEmbedder
from model.imp import Imp
from pipeline.commands import command
from pipeline.errors import RequestError, one_line
from pipeline.export.inputs import Input, settings_type

# Increased when the stored layout changes.
FORMAT = 2
CONFIG = "config.json"
# Their integers are all above 0.
_MODEL_PARTS = (ModelConfig, MoEConfig, PatchEmbedder)


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """Size and SHA-256 of another file of the folder."""

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """All of config.json.

    classifiers: data set → class names in the order of the classifier's columns. inputs: how media and texts are
    prepared; () where the model was saved without. prompts: modality → sentences around a class name in zero-shot
    classification. routing: what competes for the experts, always the tokens of one sample.
    """

    format: int
    step: int
    model: ModelConfig
    modalities: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    offsets: tuple[tuple[str, str], ...]
    classifiers: dict[str, tuple[str, ...]]
    inputs: tuple[Input, ...] = ()
    prompts: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    routing: str = "sample"
    files: dict[str, StoredFile] = dataclasses.field(default_factory=dict)

    def imp(self, model: ModelConfig | None = None) -> Imp:
        """The model's definition, by another ModelConfig where one is given."""
        return Imp(
            model or self.model,
            modalities=self.modalities,
            pairs=self.pairs,
            offsets=self.offsets,
            classifiers={name: len(names) for name, names in self.classifiers.items()},
        )


def read_config(folder: Path | str) -> ExportConfig:
    """config.json, checked. Raises RequestError."""
    path = Path(folder) / CONFIG
    try:
        found = json.loads(path.read_bytes())
    except OSError as e:
        why = e.strerror or one_line(e)
        raise RequestError(f"{path}: expected an exported model's {CONFIG}, found {why}") from e
    except (ValueError, RecursionError) as e:
        raise RequestError(f"{path}: expected JSON, found {one_line(e)}") from e
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        other = f"format {found.get('format')!r}" if isinstance(found, dict) else type(found).__name__
        again = f"; export the run again with {command('export')}" if isinstance(found, dict) else ""
        raise RequestError(f"{path}: expected an exported model of format {FORMAT}, found {other}{again}")
    try:
        return _Reader(path).config(found)
    except ValueError as e:  # what dataclasses refuse
        raise RequestError(f"{path}: {one_line(e)}") from e


class _Reader:
    """Checks the values of a config.json, and names its path where one is wrong."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def config(self, found: dict) -> ExportConfig:
        """The values, which fit each other. Raises RequestError."""
        config = self._dataclass(ExportConfig, found, "")
        known = config.model.modalities
        right = config.modalities and set(config.modalities) <= set(known)
        self._require(right, "modalities", f"some of {', '.join(known)}", config.modalities)
        for name in ("pairs", "offsets"):
            right = all(self._is_pair(pair, config.modalities) for pair in getattr(config, name))
            self._require(right, name, f"pairs of two of {', '.join(config.modalities)}", getattr(config, name))
        self._require("model.safetensors" in config.files, "files", "model.safetensors among them", list(config.files))
        for number, one in enumerate(config.inputs):
            self._check_input(one, f"inputs[{number}]", config)
        return config

    def _check_input(self, one: Input, where: str, config: ExportConfig) -> None:
        known = f"one of {', '.join(config.modalities)}"
        self._require(one.embedder in config.modalities, f"{where}.embedder", known, one.embedder)
        if one.pair:
            right = one.embedder in one.pair and one.pair in terms.spaces(config.pairs, heads=config.model.heads)
            self._require(right, f"{where}.pair", f"a space of {one.embedder}", one.pair)
        else:
            columns = config.classifiers.get(one.data_set, ())
            right = one.classes and set(one.classes) <= set(columns)
            self._require(right, f"{where}.classes", f"names of the classifier {one.data_set!r}", one.classes)

    @staticmethod
    def _is_pair(pair: tuple[str, ...], modalities: tuple[str, ...]) -> bool:
        return len(set(pair)) == 2 and set(pair) <= set(modalities)

    def _require(self, right: object, key: str, expected: str, found: Any) -> None:
        if not right:
            raise RequestError(f"{self._path}: {key}: expected {expected}, found {json.dumps(found)[:80]}")

    def _check_keys(self, where: str, found: dict, *, needed: set[str], known: set[str]) -> None:
        missing, unknown = sorted(needed - set(found)), sorted(set(found) - known)
        if missing or unknown:
            parts = [f"{what} {', '.join(keys)}" for what, keys in (("no", missing), ("unknown", unknown)) if keys]
            raise RequestError(
                f"{self._path}: expected the keys of format {FORMAT}, found in {where or 'the file'} {'; '.join(parts)}"
            )

    def _dataclass(self, cls: type, found: Any, where: str) -> Any:
        """A dataclass from a JSON object. A field that a newer version added has its default."""
        self._require(isinstance(found, dict), where, "an object", found)
        hints, fields = typing.get_type_hints(cls), dataclasses.fields(cls)
        nothing = dataclasses.MISSING
        needed = {f.name for f in fields if f.default is nothing and f.default_factory is nothing}
        self._check_keys(where, found, needed=needed, known=set(hints))
        values = {}
        for field in fields:
            if field.name not in found:
                continue
            name, at, hint = field.name, f"{where}.{field.name}".removeprefix("."), hints[field.name]
            if cls is Input and name == "settings":
                hint = settings_type(str(found.get("modality"))) or types.NoneType
            values[name] = self._value(found[name], hint, at, positive=cls in _MODEL_PARTS)
            self._check_bounds(values[name], field.metadata, at)
        try:
            return cls(**values)
        except ValueError as e:
            # The model's own messages name their fields in full.
            raise ValueError(f"{'' if cls in _MODEL_PARTS else where + ': '}{e}") from e

    def _check_bounds(self, value: Any, bounds: typing.Mapping, where: str) -> None:
        """The bounds of a recipe's key."""
        if value is None or isinstance(value, tuple):
            return
        for name, words, holds in (
            ("ge", "at least", lambda v, b: v >= b),
            ("gt", "more than", lambda v, b: v > b),
            ("le", "at most", lambda v, b: v <= b),
        ):
            if name in bounds:
                self._require(holds(value, bounds[name]), where, f"{words} {bounds[name]}", value)

    def _value(self, found: Any, hint: Any, where: str, *, positive: bool) -> Any:
        origin, of = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            (other,) = (kind for kind in of if kind is not types.NoneType)
            return None if found is None else self._value(found, other, where, positive=positive)
        if origin is typing.Literal:
            self._require(found in of and type(found) is not bool, where, f"one of {', '.join(map(str, of))}", found)
            return found
        if origin is tuple:
            return self._tuple(found, of, where, positive=positive)
        if origin is dict:
            self._require(isinstance(found, dict), where, "an object", found)
            return {k: self._value(v, of[1], f"{where}.{k}", positive=positive) for k, v in found.items()}
        if dataclasses.is_dataclass(hint):
            return self._dataclass(typing.cast(type, hint), found, where)
        return self._plain(found, hint, where, positive=positive)

    def _plain(self, found: Any, hint: type, where: str, *, positive: bool) -> Any:
        if hint in (types.NoneType, dict):
            self._require(isinstance(found, hint), where, "null" if hint is types.NoneType else "an object", found)
            return found
        least = 1 if positive else 0
        right = type(found) in ((int, float) if hint is float else (hint,)) and (hint is not int or found >= least)
        expected = {int: f"an integer {'above' if positive else 'of at least'} 0", str: "a text"}
        self._require(right, where, expected.get(hint, f"a {hint.__name__}"), found)
        return hint(found)

    def _tuple(self, found: Any, of: tuple, where: str, *, positive: bool) -> tuple:
        same = of[-1] is Ellipsis
        length = len(found) if same and isinstance(found, list) else len(of)
        right = isinstance(found, list) and len(found) == length
        if of[0] is int:
            right = right and all(type(v) is int and v >= positive for v in found)
            self._require(right, where, f"{length} integers {'above' if positive else 'of at least'} 0", found)
        self._require(right, where, "a list" if same else f"a list of {length}", found)
        kinds = of[:1] * length if same else of
        return tuple(
            self._value(value, kind, f"{where}[{n}]", positive=positive)
            for n, (value, kind) in enumerate(zip(found, kinds, strict=True))
        )
