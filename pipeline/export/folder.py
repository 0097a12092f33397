"""The files of an exported model, written whole or not at all; ``loading`` reads them.

``model.safetensors``: the float32 parameters. ``config.json``: all else (``config.ExportConfig``), written last.
``tokenizer.model`` (sentencepiece) or ``tokenizer.json`` where the run has one. ``selftest.safetensors``: small inputs
with their embeddings, where the model was saved with what prepares its inputs. The files of ``hub`` where it has a
common space.
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
from pipeline.data.modalities import MODALITIES
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import RequestError, one_line
from pipeline.export.config import CONFIG, FORMAT, ExportConfig, StoredFile
from pipeline.export.encoder import Encoder
from pipeline.export.features import Features
from pipeline.export.hub.writing import has_vectors, write_hub_files
from pipeline.export.inputs import Input
from pipeline.export.parameters import PARAMETERS, named_arrays
from pipeline.export.selftest import write_selftest
from pipeline.export.stablehlo import write_stablehlo
from pipeline.files import TEMPORARY_SUFFIX, sha256_of, whole_file, write_bytes, write_json

CARD = "README.md"
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
    card: str = "",
    stablehlo: bool = False,
) -> None:
    """Writes a model to a new or empty folder, which is whole or absent whatever happens in between.

    classes: class names of every classifier, in the order of its columns. inputs, prompts: as ``ExportConfig`` has
    them; without inputs ``load_model`` reads the folder, and ``load`` has nothing to prepare media with. card: text of
    README.md, which anyone may edit later: it has no digest. stablehlo: whether ``stablehlo.write_stablehlo`` adds its
    files.
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
        if inputs:
            reader = Tokenizer(tokenizer) if tokenizer else None
            write_selftest(temporary, Encoder(Features(imp, params), config, reader, MODALITIES))
        if has_vectors(config.inputs):
            write_hub_files(temporary)
        if stablehlo:
            write_stablehlo(temporary, imp, params, config.inputs)
        files = {path.name: _stored(path) for path in sorted(temporary.iterdir())}
        if card:
            write_bytes(temporary / CARD, card.encode())
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
        # Not counting what a killed export has left.
        found = next((path for path in folder.iterdir() if path.suffix != TEMPORARY_SUFFIX), None)
        if found is None:
            return folder
        raise RequestError(f"{folder}: expected a new or an empty folder, found {found.name} in it")
    if folder.exists():
        raise RequestError(f"{folder}: expected a new or an empty folder, found a file")
    return folder


@contextlib.contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which is removed where the block raises; when it ends, ``folder`` has its files.

    A new folder appears whole. One that exists may be a mount or a link, which nothing can replace: it is filled from
    inside, ``CONFIG`` last, without which nobody reads it.
    """
    name = f".{folder.name}.{os.getpid()}-{threading.get_ident()}{TEMPORARY_SUFFIX}"
    exists = folder.is_dir()
    temporary = folder / name if exists else folder.with_name(name)
    try:
        temporary.mkdir(parents=True)
    except OSError as e:
        raise RequestError(f"{folder}: expected a place for a folder, found {_why(e)}") from e
    try:
        yield temporary
        if exists:
            check_new(folder)
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == CONFIG):
                os.rename(path, folder / path.name)
        else:
            os.rename(temporary, folder)  # over nothing or an empty folder: another writer's files are never replaced
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _stored(path: Path) -> StoredFile:
    return StoredFile(path.stat().st_size, sha256_of(path))


def _why(error: OSError) -> str:
    return error.strerror or one_line(error)
