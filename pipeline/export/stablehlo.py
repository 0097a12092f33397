"""The encoder of each modality as one StableHLO function for any number of samples, which jax alone runs.

``MODALITY.stablehlo`` is what ``jax.export`` serialises: a function of the arrays of model.safetensors, by name, and of
the tokens of its samples. It returns their places in each space of the modality, by name, of unit length.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from model.groups import embed_group, encoder_group, head_groups, pair_group
from model.imp import Imp
from pipeline.data.modalities import TEXT
from pipeline.data.tokens import grid_positions
from pipeline.errors import RequestError
from pipeline.export.inputs import Input, is_built_in
from pipeline.export.parameters import named_arrays
from pipeline.files import write_bytes

_SUFFIX = ".stablehlo"


def check_package() -> None:
    """Raises RequestError without the package that jax serialises functions with."""
    if importlib.util.find_spec("flatbuffers") is None:
        raise RequestError("--stablehlo needs the package flatbuffers: pip install flatbuffers")


def write_stablehlo(folder: Path, imp: Imp, params: dict, inputs: Sequence[Input]) -> None:
    """Writes one file a modality into a folder that is being filled, each for its largest form."""
    names = dict.fromkeys(one.modality for one in inputs if one.pair and is_built_in(one.modality))
    # Kernels of one maker's accelerators have no place in it.
    imp = imp.with_config(dataclasses.replace(imp.config, attention="xla"))
    for name in names:
        of_modality = [one for one in inputs if one.modality == name and one.pair]
        write_bytes(folder / f"{name}{_SUFFIX}", _serialized(imp, params, of_modality))


def _serialized(imp: Imp, params: dict, inputs: list[Input]) -> bytes:
    largest = max(
        inputs, key=lambda one: (max((v.num_vision_tokens for v in one.variants), default=0), one.text_length)
    )
    embedder, pairs = largest.embedder, {one.space: one.pair for one in inputs}
    heads = head_groups(imp.config, [(embedder, embedder)]) or [pair_group(*pair) for pair in pairs.values()]
    used = {encoder_group(imp.config, embedder), embed_group(embedder), *heads}
    params = {group: values for group, values in params.items() if group in used}
    shapes = {group: values for group, values in imp.shapes().items() if group in used}
    positions, values, dtype = _form(imp, largest)

    def places(arrays: dict[str, jax.Array], tokens: jax.Array) -> dict[str, jax.Array]:
        tree = jax.tree.map_with_path(lambda at, _: arrays["/".join(str(key.key) for key in at)], shapes)
        rows = jnp.broadcast_to(jnp.asarray(positions), (tokens.shape[0], *positions.shape))
        features = imp.encode(tree, embedder, tokens, rows, tokens != 0 if embedder == TEXT else None)
        found = {}
        for space, pair in pairs.items():
            target = next(name for name in pair if name != embedder)
            place = imp.project(tree, features, source=embedder, target=target)
            found[space] = place / jnp.maximum(jnp.linalg.norm(place, axis=-1, keepdims=True), 1e-6)
        return found

    arrays = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in named_arrays(params, shapes).items()}
    (batch,) = jax.export.symbolic_shape("samples")
    tokens = jax.ShapeDtypeStruct((batch, len(positions), *values), dtype)
    return jax.export.export(jax.jit(places))(arrays, tokens).serialize()


def _form(imp: Imp, one: Input) -> tuple[np.ndarray, tuple[int, ...], type]:
    """(positions of a sample's tokens, the shape of a token, its type)."""
    config = imp.config
    if one.modality == TEXT:
        return np.arange(one.text_length, dtype=np.int32)[:, None], (), np.int32
    if one.embedder == "audio":
        return grid_positions(one.settings.grid, config.audio_positions), (config.patch_values("audio"),), np.float32
    variant, (time, height, width) = one.variants[0], config.vision_patch
    values = 3 * height * width * (time if variant.num_frames else 1)
    return grid_positions(variant.grid, config.vision_positions), (values,), np.uint8
