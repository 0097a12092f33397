"""Where a new run takes parameters from: a checkpoint of another run, or an exported model."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import jax

from model import sharding
from model.imp import Imp
from pipeline.export.config import CONFIG
from pipeline.export.loading import load_model, stored_tokenizer, verified_config
from pipeline.train.checkpoint import Checkpoints, parameter_shapes
from pipeline.train.checkpoint_folder import CheckpointFolder
from pipeline.train.devices import host_device

# (group, path of a parameter as ``parameter_shapes`` names it).
Place = tuple[str, str]


class InitSource(Protocol):
    """Parameters with their names and shapes.

    shapes: group → path → shape. classes: data set → the class names of its classifier, in the order of its columns.
    """

    name: str
    step: int
    shapes: dict[str, dict[str, list[int]]]
    classes: Mapping[str, list[str]]

    def arrays(self, params: dict, take: dict[str, set[str]]) -> dict[Place, jax.Array]:
        """Those at the paths ``take`` of each group, on the host. params: a tree of arrays of the same shapes."""
        ...


def open_source(folder: Path, step: int | None) -> InitSource:
    """The source in a folder. step: of a run's checkpoint. Raises RequestError."""
    return _Exported(folder) if is_export(folder) else _Checkpoint(folder, step)


def is_export(folder: Path) -> bool:
    """Whether a folder is an exported model, not a run directory."""
    return (folder / CONFIG).is_file()


def choose_step(folder: Path) -> tuple[int, list[str]]:
    """(the step of the parameters, lines on damaged checkpoints that were passed over). Reads every byte.

    It is the same for all processes of the run. Raises RequestError without a source, or for one that is damaged.
    """
    if is_export(folder):
        return verified_config(folder).step, []
    checkpoints = CheckpointFolder(folder)
    step, lines = checkpoints.choose()
    return checkpoints.data(step)["step"], lines


def source_tokenizer(folder: Path, step: int) -> bytes | None:
    """The tokenizer that the parameters of a source's texts go with."""
    if is_export(folder):
        return stored_tokenizer(folder, verified_config(folder))
    return base64.b64decode(CheckpointFolder(folder).data(step)["tokenizer"]) or None


class _Checkpoint:
    def __init__(self, folder: Path, step: int | None) -> None:
        self._checkpoints = Checkpoints(folder)
        data = self._checkpoints.data(step)
        self.name, self.step = str(self._checkpoints.folder.parent), data["step"]
        self.shapes, self.classes = data["groups"], data["classes"]

    def arrays(self, params: dict, take: dict[str, set[str]]) -> dict[Place, jax.Array]:
        place = jax.sharding.SingleDeviceSharding(host_device())
        abstract: dict = {}
        for group, paths in take.items():
            for path, leaf in jax.tree.leaves_with_path(params[group]):
                if jax.tree_util.keystr(path) in paths:
                    names = sharding.path_keys(path)
                    node = abstract.setdefault(group, {}).setdefault("params", {})
                    for name in names[:-1]:
                        node = node.setdefault(name, {})
                    node[names[-1]] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
        loaded = self._checkpoints.state(abstract, step=self.step)
        return _by_place({group: value["params"] for group, value in loaded.items()}, take)


class _Exported:
    def __init__(self, folder: Path) -> None:
        config = verified_config(folder)
        imp: Imp = config.imp()
        self.name, self.step, self._folder = str(folder), config.step, folder
        self.shapes = parameter_shapes({group: {"params": shapes} for group, shapes in imp.shapes().items()})
        self.classes = {name: list(classes) for name, classes in config.classifiers.items()}

    def arrays(self, params: dict, take: dict[str, set[str]]) -> dict[Place, jax.Array]:
        with jax.default_device(host_device()):
            _, stored = load_model(self._folder)
        return _by_place(stored, take)


def _by_place(params: dict, take: dict[str, set[str]]) -> dict[Place, jax.Array]:
    leaves = {group: jax.tree.leaves_with_path(params[group]) for group in take}
    named = {(g, jax.tree_util.keystr(path)): leaf for g, found in leaves.items() for path, leaf in found}
    return {place: leaf for place, leaf in named.items() if place[1] in take[place[0]]}
