"""The files of an exported model, written whole or not at all and compared with their digests when they are read.

``model.safetensors``: the float32 parameters. ``config.json``: all else (``config.ExportConfig``), written last.
``tokenizer.model`` (sentencepiece) or ``tokenizer.json`` where the run has one. ``selftest.safetensors``: small inputs
with their embeddings, where the model was saved with what prepares its inputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from model.imp import Imp
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import RequestError, one_line
from pipeline.export.config import CONFIG, FORMAT, ExportConfig, StoredFile, read_config
from pipeline.export.inputs import Input
from pipeline.export.parameters import PARAMETERS, named_arrays, read_parameters
from pipeline.files import TEMPORARY_SUFFIX, sha256_of, whole_file, write_bytes, write_json

TOKENIZERS = ("tokenizer.model", "tokenizer.json")


def save_model(
    folder: Path | str,
    imp: Imp,
    params: dict,
    *,
    step: int,
    classes: Mapping[str, Sequence[str]] | None = None,
    tokenizer: bytes | None = None,
    inputs: Sequence[Input] = (),
    prompts: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Writes a model to a new or empty folder, which is whole or absent whatever happens in between.

    classes: class names of every classifier, in the order of its columns. inputs, prompts: as ``ExportConfig`` has
    them; without inputs ``load_model`` reads the folder, and ``load`` has nothing to prepare media with.
    Raises RequestError where the folder is in use, and ValueError where params or classes are not those of ``imp``.
    """
    folder, classes = check_new(folder), {name: tuple(names) for name, names in (classes or {}).items()}
    arrays = named_arrays(params, imp.shapes())
    if {name: len(names) for name, names in classes.items()} != imp.classifiers:
        found = {name: len(names) for name, names in classes.items()}
        raise ValueError(f"classes: expected as many names as {imp.classifiers}, found {found}")
    config = ExportConfig(
        format=FORMAT,
        step=step,
        model=imp.config,
        modalities=imp.modalities,
        pairs=imp.pairs,
        offsets=imp.offsets,
        classifiers=classes,
        inputs=tuple(inputs),
        prompts={name: tuple(sentences) for name, sentences in (prompts or {}).items()},
    )
    with _whole_folder(folder) as temporary:
        _write_arrays(temporary / PARAMETERS, arrays)
        if tokenizer:
            # As pipeline.data.tokenizer.Tokenizer tells the two kinds apart.
            write_bytes(temporary / TOKENIZERS[tokenizer.startswith(b"{")], tokenizer)
        files = {path.name: _stored(path) for path in sorted(temporary.iterdir())}
        write_json(temporary / CONFIG, dataclasses.asdict(dataclasses.replace(config, files=files)))


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with whole_file(path) as temporary, tempfile.TemporaryDirectory(dir=path.parent) as folder:
        save_file(arrays, temporary)
        # safetensors lets nobody else read its files; this one has the mode of any new file.
        (plain := Path(folder) / "plain").touch()
        shutil.copymode(plain, temporary)


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
def _whole_folder(folder: Path) -> Iterator[Path]:
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


def load_model(folder: Path | str, **changes: object) -> tuple[Imp, dict]:
    """The model and its parameters, bit for bit as they were saved, on jax's default device.

    changes: fields of ModelConfig that need other values here, such as ``dtype="float32"`` on a CPU for a model that
    was exported on a GPU.
    Raises RequestError, with what was expected and found, where a file is missing, damaged or of another model.
    """
    return load_parts(Path(folder), changes)[1:]


def load_parts(folder: Path, changes: Mapping[str, object]) -> tuple[ExportConfig, Imp, dict]:
    """config.json with the model and its parameters, as ``load_model`` returns them."""
    config = read_config(folder)
    try:
        imp = config.imp(dataclasses.replace(config.model, **changes))
    except (ValueError, TypeError) as e:
        raise RequestError(f"{folder / CONFIG}: {one_line(e)}") from e
    for name, stored in config.files.items():
        _check_file(folder / Path(name).name, stored)
    return config, imp, read_parameters(folder / PARAMETERS, imp.shapes())


def load_tokenizer(folder: Path, config: ExportConfig) -> Tokenizer | None:
    """The tokenizer of a folder whose files are as config.json says; None without one."""
    name = next((name for name in TOKENIZERS if name in config.files), None)
    return None if name is None else Tokenizer((folder / name).read_bytes())


def _stored(path: Path) -> StoredFile:
    return StoredFile(path.stat().st_size, sha256_of(path))


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
        raise RequestError(f"{path}: expected a file of the exported model, found {_why(e)}; {again}") from e


def _why(error: OSError) -> str:
    return error.strerror or one_line(error)
