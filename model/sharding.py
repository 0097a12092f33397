"""Where arrays live: one mesh with the axes (data, expert); the batch over both, parameters replicated."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "expert")


def make_mesh(devices=None, *, expert: int = 1) -> Mesh:
    """A mesh over all devices of all processes. expert: devices along the expert axis."""
    devices = np.asarray(jax.devices() if devices is None else devices)
    if devices.size % expert:
        raise ValueError(f"{devices.size} devices cannot be split into {expert} expert groups")
    return Mesh(devices.reshape(-1, expert), AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The leading axis over every device."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def step_shardings(mesh: Mesh):
    """(state, batch, scalar) shardings of a step."""
    return replicated(mesh), over_batch(mesh), replicated(mesh)


def put_batch(local_batch: dict, mesh: Mesh) -> dict:
    """This process's rows of every array, placed on its devices as one global batch."""
    sharding = over_batch(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), local_batch)


def put_replicated(tree, mesh: Mesh):
    """The same value on every device of every process."""
    sharding = replicated(mesh)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)
