"""Reading an exported model's folder: every file is compared with its digest before it is used."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from model.imp import Imp
from pipeline.data.modalities import MODALITIES, Modality
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import RequestError, one_line
from pipeline.export.config import CONFIG, ExportConfig, StoredFile, read_config
from pipeline.export.encoder import Encoder
from pipeline.export.features import Features
from pipeline.export.folder import TOKENIZERS
from pipeline.export.parameters import PARAMETERS, read_parameters
from pipeline.export.selftest import check_selftest
from pipeline.files import sha256_of


def load(
    folder: Path | str,
    *,
    verify: bool = False,
    modalities: Mapping[str, Modality] | None = None,
    **changes: object,
) -> Encoder:
    """The exported model of a folder.

    verify: computes the embeddings of the folder's self-test anew, and refuses a machine that comes to others.
    modalities: those that the recipe added, by name, as ``pipeline.data.modalities`` describes them; an export names no
    code. changes: fields of ModelConfig with other values here, such as ``dtype="float32"``.
    Raises RequestError, in one line, for a folder that is damaged, incomplete or of another format.
    """
    folder = Path(folder)
    config, imp, params = _load_parts(folder, changes)
    tokenizer = _load_tokenizer(folder, config)
    encoder = Encoder(Features(imp, params), config, tokenizer, {**MODALITIES, **(modalities or {})})
    if verify:
        check_selftest(folder, encoder)
    return encoder


def load_model(folder: Path | str, **changes: object) -> tuple[Imp, dict]:
    """The model and its parameters, bit for bit as they were saved, on jax's default device.

    changes: fields of ModelConfig that need other values here, such as ``dtype="float32"`` on a CPU for a model that
    was exported on a GPU.
    Raises RequestError, with what was expected and found, where a file is missing, damaged or of another model.
    """
    return _load_parts(Path(folder), changes)[1:]


def verified_config(folder: Path | str) -> ExportConfig:
    """config.json of a folder whose other files are as it says. Raises RequestError."""
    folder = Path(folder)
    config = read_config(folder)
    for name, stored in config.files.items():
        _check_file(folder / Path(name).name, stored)
    return config


def stored_tokenizer(folder: Path | str, config: ExportConfig) -> bytes | None:
    """The tokenizer's file in an exported model's folder; None without one."""
    name = next((name for name in TOKENIZERS if name in config.files), None)
    return None if name is None else (Path(folder) / name).read_bytes()


def _load_parts(folder: Path, changes: Mapping[str, object]) -> tuple[ExportConfig, Imp, dict]:
    """config.json with the model and its parameters, as ``load_model`` returns them."""
    config = verified_config(folder)
    try:
        imp = config.imp(dataclasses.replace(config.model, **changes))
    except (ValueError, TypeError) as e:
        raise RequestError(f"{folder / CONFIG}: {one_line(e)}") from e
    return config, imp, read_parameters(folder / PARAMETERS, imp.shapes())


def _load_tokenizer(folder: Path, config: ExportConfig) -> Tokenizer | None:
    """The tokenizer of a folder whose files are as config.json says; None without one, or without its package."""
    stored = stored_tokenizer(folder, config)
    try:
        return None if stored is None else Tokenizer(stored)
    except ModuleNotFoundError:  # media do without
        return None


def _check_file(path: Path, stored: StoredFile) -> None:
    """Raises RequestError where a file is not the one that was exported."""
    again = "copy the exported folder again"
    try:
        size = path.stat().st_size
        if size != stored.bytes:
            raise RequestError(f"{path}: expected the {stored.bytes} bytes that were exported, found {size}; {again}")
        if sha256_of(path) != stored.sha256:
            raise RequestError(f"{path}: expected the bytes that were exported, found others; {again}")
    except OSError as e:
        raise RequestError(
            f"{path}: expected a file of the exported model, found {e.strerror or one_line(e)}; {again}"
        ) from e
