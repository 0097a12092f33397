"""A trained model as plain files that need neither the run nor its libraries: safetensors, JSON, the tokenizer.

``model.safetensors``: the float32 parameters, one array a name such as ``encoder/dense/attention/qkv/kernel``.
``config.json``: format, step, model (every field of ModelConfig), modalities, pairs, offsets, and classifiers, data
set → class names in the order of the classifier's columns. ``tokenizer.model`` (sentencepiece) or ``tokenizer.json``
where the run has one. Loading takes jax, flax, numpy and safetensors, and runs no code from the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import threading
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from model.config import ModelConfig, MoEConfig, PatchEmbedder
from model.imp import Imp
from pipeline.errors import RequestError, one_line
from pipeline.files import TEMPORARY_SUFFIX, whole_file, write_bytes, write_json

# Increased when the stored layout changes.
FORMAT = 1
PARAMETERS, CONFIG = "model.safetensors", "config.json"


def save_model(
    folder: Path | str,
    imp: Imp,
    params: dict,
    *,
    step: int,
    classes: dict[str, list[str]] | None = None,
    tokenizer: bytes | None = None,
) -> None:
    """Writes a model to a new or empty folder, which is whole or absent whatever happens in between.

    classes: class names of every classifier, in the order of its columns.
    Raises RequestError where the folder is in use, and ValueError where params or classes are not those of ``imp``.
    """
    folder, classes = check_new(folder), {name: list(names) for name, names in (classes or {}).items()}
    arrays = {name: np.asarray(value, order="C") for name, value in _by_name(params).items()}
    if wrong := _difference(_layout(_by_name(imp.shapes())), _layout(arrays)):
        raise ValueError(f"parameters: {wrong}")
    if {name: len(names) for name, names in classes.items()} != imp.classifiers:
        found = {name: len(names) for name, names in classes.items()}
        raise ValueError(f"classes: expected as many names as {imp.classifiers}, found {found}")
    config = {"format": FORMAT, "step": step, "model": dataclasses.asdict(imp.config)}
    config |= {"modalities": imp.modalities, "pairs": imp.pairs, "offsets": imp.offsets, "classifiers": classes}
    with _whole_folder(folder) as temporary:
        with whole_file(temporary / PARAMETERS) as path:
            path.touch()
            mode = path.stat().st_mode
            save_file(arrays, path)
            # safetensors writes for the owner alone; who may read the folder may read the model.
            path.chmod(mode)
        write_json(temporary / CONFIG, config)
        if tokenizer:
            # As pipeline.data.tokenizer.Tokenizer tells the two kinds apart.
            write_bytes(temporary / ("tokenizer.json" if tokenizer.startswith(b"{") else "tokenizer.model"), tokenizer)


def check_new(folder: Path | str) -> Path:
    """The absolute path of a folder to write. Raises RequestError unless it is new or empty."""
    folder = Path(folder).absolute()
    if folder.is_dir():
        found = next(folder.iterdir(), None)
        if found is None:
            return folder
        raise RequestError(f"{folder}: expected a new or an empty folder, found {found.name} in it")
    if folder.exists():
        raise RequestError(f"{folder}: expected a new or an empty folder, found a file")
    return folder


@contextlib.contextmanager
def _whole_folder(folder: Path) -> typing.Iterator[Path]:
    """A folder beside ``folder`` to fill: it takes its place when the block ends, and is removed where that raises."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}-{threading.get_ident()}{TEMPORARY_SUFFIX}")
    try:
        temporary.mkdir(parents=True)
    except OSError as e:
        raise RequestError(f"{folder}: expected a place for a folder, found {_why(e)}") from e
    try:
        yield temporary
        os.rename(temporary, folder)  # over nothing or an empty folder: another writer's files are never replaced
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_model(folder: Path | str, **changes) -> tuple[Imp, dict]:
    """The model and its parameters, bit for bit as they were saved, on jax's default device.

    changes: fields of ModelConfig that need other values here, such as ``dtype="float32"`` on a CPU for a model that
    was exported on a GPU.
    Raises RequestError, with what was expected and found, where a file is missing, damaged or of another model.
    """
    folder = Path(folder)
    config = read_config(folder)
    model = dataclasses.replace(config["model"], **changes)
    try:
        imp = _imp(config, model)
    except (ValueError, TypeError) as e:
        raise RequestError(f"{folder / CONFIG}: {one_line(e)}") from e
    return imp, _read_parameters(folder / PARAMETERS, imp.shapes())


def read_config(folder: Path | str) -> dict:
    """config.json, checked; "model" is a ModelConfig. Raises RequestError."""
    path = Path(folder) / CONFIG
    try:
        found = json.loads(path.read_bytes())
    except OSError as e:
        raise RequestError(f"{path}: expected an exported model's {CONFIG}, found {_why(e)}") from e
    except (ValueError, RecursionError) as e:
        raise RequestError(f"{path}: expected JSON, found {one_line(e)}") from e
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        other = f"format {found.get('format')!r}" if isinstance(found, dict) else type(found).__name__
        raise RequestError(f"{path}: expected an exported model of format {FORMAT}, found {other}")
    try:
        return _Reader(path).config(found)
    except ValueError as e:  # what ModelConfig and MoEConfig refuse
        raise RequestError(f"{path}: {one_line(e)}") from e


class _Reader:
    """Checks the values of a config.json, and names its path where one is wrong."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def config(self, found: dict) -> dict:
        """The values with "model" as a ModelConfig. Raises RequestError."""
        keys = {"format", "step", "model", "modalities", "pairs", "offsets", "classifiers"}
        self._check_keys("the file", found, needed=keys, known=keys)
        modalities, classifiers = found["modalities"], found["classifiers"]
        model = self._dataclass(ModelConfig, found["model"], "model")
        known = self._strings(modalities) and set(modalities) <= set(model.modalities)
        self._require(known and modalities, "modalities", f"some of {', '.join(model.modalities)}", modalities)
        for key in ("pairs", "offsets"):
            right = isinstance(found[key], list) and all(self._is_pair(p, modalities) for p in found[key])
            self._require(right, key, f"pairs of two of {', '.join(modalities)}", found[key])
        right = isinstance(classifiers, dict) and all(self._strings(names) for names in classifiers.values())
        self._require(right, "classifiers", "a list of class names for each data set", classifiers)
        self._require(type(found["step"]) is int, "step", "an integer", found["step"])
        return found | {"model": model}

    @staticmethod
    def _strings(found: typing.Any) -> bool:
        return isinstance(found, list) and all(isinstance(v, str) for v in found)

    def _is_pair(self, found: typing.Any, modalities: list[str]) -> bool:
        return self._strings(found) and len(found) == len(set(found)) == 2 and set(found) <= set(modalities)

    def _require(self, right: object, key: str, expected: str, found: typing.Any) -> None:
        if not right:
            raise RequestError(f"{self._path}: {key}: expected {expected}, found {json.dumps(found)[:80]}")

    def _check_keys(self, where: str, found: dict, *, needed: set[str], known: set[str]) -> None:
        missing, unknown = sorted(needed - set(found)), sorted(set(found) - known)
        if missing or unknown:
            parts = [f"{what} {', '.join(keys)}" for what, keys in (("no", missing), ("unknown", unknown)) if keys]
            raise RequestError(
                f"{self._path}: expected the keys of format {FORMAT}, found in {where} {'; '.join(parts)}"
            )

    def _dataclass(self, cls: type, found: typing.Any, where: str) -> typing.Any:
        """A ModelConfig or a part of it. A field that a newer version added has its default."""
        self._require(isinstance(found, dict), where, "an object", found)
        hints = typing.get_type_hints(cls)
        needed = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        self._check_keys(where, found, needed=needed, known=set(hints))
        return cls(**{name: self._value(value, hints[name], f"{where}.{name}") for name, value in found.items()})

    def _value(self, found: typing.Any, hint: typing.Any, where: str) -> typing.Any:
        if hint == MoEConfig | None:
            return None if found is None else self._dataclass(MoEConfig, found, where)
        if hint == tuple[PatchEmbedder, ...]:
            self._require(isinstance(found, list), where, "a list", found)
            return tuple(self._dataclass(PatchEmbedder, embedder, where) for embedder in found)
        if typing.get_origin(hint) is tuple:
            kinds = typing.get_args(hint)
            length = len(found) if kinds[-1] is Ellipsis and isinstance(found, list) else len(kinds)
            right = isinstance(found, list) and len(found) == length and all(type(v) is int and v > 0 for v in found)
            self._require(right, where, f"{length} integers above 0", found)
            return tuple(found)
        right = type(found) in ((int, float) if hint is float else (hint,)) and (hint is not int or found > 0)
        self._require(right, where, "an integer above 0" if hint is int else f"a {hint.__name__}", found)
        return hint(found)


def _imp(config: dict, model: ModelConfig) -> Imp:
    return Imp(
        model,
        modalities=tuple(config["modalities"]),
        pairs=tuple(map(tuple, config["pairs"])),
        offsets=tuple(map(tuple, config["offsets"])),
        classifiers={name: len(names) for name, names in config["classifiers"].items()},
    )


def _read_parameters(path: Path, shapes: dict) -> dict:
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            found = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
            if wrong := _difference(_layout(_by_name(shapes)), found):
                raise RequestError(f"{path}: {wrong}; is it of the same export as {CONFIG}?")
            return jax.tree.map_with_path(lambda at, _: jnp.asarray(file.get_tensor(_name(at))), shapes)
    except OSError as e:
        raise RequestError(f"{path}: expected the model's parameters, found {_why(e)}") from e
    except SafetensorError as e:
        size = path.stat().st_size
        raise RequestError(f"{path}: expected a whole safetensors file, found {size} bytes: {one_line(e)}") from e


def _why(error: OSError) -> str:
    return error.strerror or one_line(error)


def _name(path) -> str:
    return "/".join(str(key.key) for key in path)


def _by_name(tree: dict) -> dict:
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _layout(arrays: dict) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → (type as safetensors calls it, shape)."""
    return {name: ("F32" if x.dtype == np.float32 else str(x.dtype), tuple(x.shape)) for name, x in arrays.items()}


def _difference(expected: dict, found: dict) -> str | None:
    """One line on the first difference in the names, types and shapes of a model's arrays; None without any."""
    for kind, names in (("no", expected.keys() - found.keys()), ("unknown", found.keys() - expected.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"expected {len(expected)} arrays, found {len(found)}: {kind} {min(names)}{more}"
    for name, (dtype, shape) in expected.items():
        if found[name] != (dtype, shape):
            return f"array {name}: expected {dtype} {shape}, found {found[name][0]} {found[name][1]}"
    return None
