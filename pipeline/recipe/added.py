"""The modalities that a recipe adds: ``modalities: {depth: package.module:NAME}``.

names: that mapping, name → "package.module:NAME" of a ``pipeline.data.modalities.Modality``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from model.config import PatchEmbedder
from pipeline.data.modalities import EMBEDDERS, Embedder, Modality, embedder_name, load, load_modality
from pipeline.data.spec import AddedModality
from pipeline.errors import RequestError


def added_modalities(names: Mapping[str, str]) -> dict[str, Modality]:
    """Name → modality. Raises RequestError for a name that is taken or a registration that is missing."""
    out = {}
    for name, registration in names.items():
        if name in EMBEDDERS or name in EMBEDDERS.values() or not name.isidentifier():
            raise RequestError(f"modalities.{name}: expected a new name, of letters, digits and _")
        try:
            out[name] = load_modality(registration)
        except ValueError as e:
            raise RequestError(f"modalities.{name}: {e}") from e
    return out


def embedders(names: Mapping[str, str]) -> dict[str, str]:
    """Modality → the model's name for its layers, of built-in and added ones."""
    return EMBEDDERS | {name: embedder_name(name, modality) for name, modality in added_modalities(names).items()}


def has_frames(names: Mapping[str, str], modalities: Sequence[str]) -> bool:
    """Whether one of a task's modalities is cut into patches of frames, so that the task has variants."""
    known = embedders(names)
    return any(known[modality] == "vision" for modality in modalities)


def patch_embedders(names: Mapping[str, str]) -> tuple[PatchEmbedder, ...]:
    """``ModelConfig.embedders``: the added modalities with their own layers."""
    own = ((name, modality.embedder) for name, modality in added_modalities(names).items())
    return tuple(PatchEmbedder(name, e.num_values, e.positions) for name, e in own if isinstance(e, Embedder))


def added_specs(
    names: Mapping[str, str], media: Mapping[str, Mapping[str, Any]], *, data_set: str
) -> tuple[AddedModality, ...]:
    """``DataSetSpec.added`` of a data set. media: modality → the settings that the recipe gives for it."""
    out = []
    for name, modality in sorted(added_modalities(names).items()):
        settings = _settings(modality, media.get(name, {}), where=f"data_sets.{data_set}.media.{name}")
        out.append(AddedModality(name, modality, settings))
    return tuple(out)


def _settings(modality: Modality, given: Mapping[str, Any], *, where: str) -> Any:
    kind = load(modality.settings)
    known = [field.name for field in dataclasses.fields(kind)]
    unknown = [key for key in given if key not in known]
    if unknown:
        raise RequestError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(known)}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    try:
        return kind(**values)
    except ValueError as e:
        raise RequestError(f"{where}: {e}") from e
