"""Small inputs and their embeddings beside an exported model, by which another machine finds out whether it agrees.

``selftest.safetensors``: ``input/NAME`` and ``embedding/NAME/SPACE`` for each modality NAME, texts as UTF-8 bytes; its
metadata name the place that computed them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pipeline.data.media.machine import cpu_flags, cpu_kind
from pipeline.data.modalities import TEXT
from pipeline.errors import RequestError, one_line
from pipeline.export.choices import FEATURES
from pipeline.export.encoder import ARGUMENTS, Encoder
from pipeline.export.inputs import Input
from pipeline.files import write_bytes

SELFTEST = "selftest.safetensors"
# Largest difference, as a share of the largest value of an embedding, on another kind of machine: rounding in other
# orders differs by 1e-6 in float32 and by 1e-2 in bfloat16; a wrong channel order or sample rate by more than 0.1.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
# Of the noise in pictures and sounds.
_SEED = 20230510
_FPS, _RATE_HZ = 8.0, 16_000
_TEXTS = ("a red dog runs to the left", "one two three 1 2 3", "это и есть текст", "一 二 三")


def write_selftest(folder: Path, encoder: Encoder) -> None:
    """Writes the file into a folder that is being filled."""
    arrays = {}
    for name, item in _items(encoder).items():
        arrays[f"input/{name}"] = np.frombuffer(item.encode(), np.uint8) if name == TEXT else item
        for space, found in _embeddings(encoder, name, item):
            arrays[f"embedding/{name}/{space}"] = found
    write_bytes(folder / SELFTEST, save(arrays, {"place": json.dumps(_place())}))


def check_selftest(folder: Path, encoder: Encoder) -> None:
    """Computes the embeddings anew: equal on the same kind of machine, within ``TOLERANCE`` on another.

    Raises RequestError with the modalities that differ, and by how much.
    """
    path = folder / SELFTEST
    stored, place = _read(path)
    used, exported = encoder.model.imp.config, encoder.config.model
    exact = place == _place() and used == exported and jax.default_backend() == "cpu"
    limit, wrong = 0.0 if exact else max(TOLERANCE[c.dtype] for c in (used, exported)), []
    for name in sorted(key.removeprefix("input/") for key in stored if key.startswith("input/")):
        item = stored[f"input/{name}"]
        item = item.tobytes().decode() if name == TEXT else item
        for space, found in _embeddings(encoder, name, item):
            expected = stored.get(f"embedding/{name}/{space}")
            difference = np.inf if expected is None else _difference(expected, found)
            if not difference <= limit:
                wrong.append(f"{name} in {space} by {difference:.1e}")
    if wrong:
        where = "on the same kind of machine" if exact else f"than the {limit:g} allowed on another kind of machine"
        raise RequestError(f"{path}: embeddings differ {'' if exact else 'by more '}{where}: {'; '.join(wrong)}")


def _difference(expected: np.ndarray, found: np.ndarray) -> float:
    if expected.shape != found.shape:
        return float("inf")
    return float(np.abs(expected - found).max() / max(np.abs(expected).max(), 1e-30))


def _place() -> dict[str, str]:
    """What bits depend on."""
    flags = hashlib.sha256(" ".join(sorted(cpu_flags())).encode()).hexdigest()[:16]
    cpu = {"kind": cpu_kind(), "flags": flags, "cores": str(os.cpu_count())}
    return cpu | {"jax": jax.__version__, "device": jax.devices()[0].device_kind}


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return arrays, json.loads((file.metadata() or {}).get("place", "{}"))
    except (OSError, SafetensorError, ValueError) as e:
        raise RequestError(f"{path}: expected the self-test of an exported model, found {one_line(e)}") from e


def _items(encoder: Encoder) -> dict[str, Any]:
    """Modality → a small item, for the built-in modalities of the model."""
    rng, known = np.random.default_rng(_SEED), {one.modality for one in encoder.config.inputs}
    coarse = rng.integers(0, 256, (8, 6, 8, 3), np.uint8).repeat(12, 1).repeat(12, 2)  # (8, 72, 96, 3)
    seconds = np.arange(3 * _RATE_HZ) / _RATE_HZ
    sound = np.sin(2 * np.pi * 440 * seconds) / 2 + rng.normal(size=len(seconds)) / 16
    items = {"image": coarse[0], "video": coarse, "audio": sound.astype(np.float32)}
    items = {name: item for name, item in items.items() if name in known}
    readable = (text for text in _TEXTS if encoder.tokenizer and encoder.tokenizer.has_tokens(text))
    if TEXT in known and (text := next(readable, None)):
        items[TEXT] = text
    return items


def _embeddings(encoder: Encoder, name: str, item: Any) -> Iterator[tuple[str, np.ndarray]]:
    """(space, (K,)) by the first data set that has each of them."""
    argument = next(argument for argument, modality in ARGUMENTS.items() if modality == name)
    of_modality: list[Input] = [one for one in encoder.config.inputs if one.modality == name]
    first = {one.space or FEATURES: one.data_set for one in reversed(of_modality)}
    for space, data_set in sorted((first | {FEATURES: of_modality[0].data_set}).items()):
        rates = {"fps": _FPS, "sample_rate": _RATE_HZ}
        found = encoder.embed(**{argument: [item]}, space=space, data_set=data_set, **rates)
        yield space, found[argument][0]
