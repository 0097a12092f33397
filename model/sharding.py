"""The layout of arrays over devices: one mesh with the axes (data, expert).

The batch is sharded over both axes, expert weights over ``expert``; everything else is on every device or, with FSDP,
sharded over ``data``. Routing groups never cross a device: tokens move only between the devices of the expert axis,
on their way to their experts and back.

The compiler learns of the mesh from ``jax.set_mesh`` around tracing (``step.compile_step``); without one, the functions
that constrain an array return it as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

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


def state_shardings(shapes: Any, mesh: Mesh | AbstractMesh, *, fsdp: bool = False) -> Any:
    """The sharding of every array of a tree of parameters or moments.

    Expert weights (.., E, in, out) lie over the expert axis. fsdp: the longest axis of every array that the number of
    devices along ``data`` divides lies over ``data`` too, layers of a stack excepted; the compiler then gathers one
    layer's weights at a time.
    Raises ValueError if the expert axis does not divide the experts.
    """
    return jax.tree.map_with_path(lambda path, x: NamedSharding(mesh, _spec(path, x.shape, mesh, fsdp=fsdp)), shapes)


def path_keys(path) -> list:
    """The keys of nested dicts that lead to a leaf, as jax.tree.map_with_path gives them."""
    return [getattr(key, "key", None) for key in path]


def _spec(path, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, *, fsdp: bool) -> PartitionSpec:
    names = path_keys(path)
    axes: list[str | None] = [None] * len(shape)
    if "experts" in names and mesh.shape["expert"] > 1:
        num_experts = shape[-3]
        if num_experts % mesh.shape["expert"]:
            raise ValueError(f"{num_experts} experts cannot lie over {mesh.shape['expert']} devices in equal parts")
        axes[-3] = "expert"
    if fsdp and mesh.shape["data"] > 1:
        # Stacks of layers are scanned over their first axis, which every device needs whole.
        stacked = int(bool({"dense", "sparse"} & set(names)))
        free = [a for a in range(stacked, len(shape)) if axes[a] is None and shape[a] % mesh.shape["data"] == 0]
        if free:
            axes[max(free, key=lambda a: shape[a])] = "data"
    return PartitionSpec(*axes)


def check_batch(structure, group_samples: dict[str, int], mesh: Mesh | AbstractMesh) -> None:
    """Raises ValueError, with the numbers, if the devices cannot share a structure's batch in equal parts that hold
    whole routing groups. group_samples: modality → samples of a group.
    """
    size = structure.global_batch_size
    parts, devices = structure.microbatches, mesh.size
    if size % (devices * parts):
        each = f" of {parts} microbatches each" if parts > 1 else ""
        raise ValueError(f"a batch of {size} samples cannot be shared by {devices} devices{each} in equal parts")
    per_device = size // (devices * parts)
    for modality, group in group_samples.items():
        if per_device % group:
            raise ValueError(
                f"{per_device} samples a device cannot be cut into {modality} routing groups of {group} samples; make "
                f"the batch a multiple of {devices * parts * group} (it is {size}), or lower moe.group_size"
            )


def platform() -> str:
    """The kind of the devices in use, "cpu", "gpu" or "tpu": those of the mesh that the compiler knows of."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _mesh() -> AbstractMesh | None:
    """The mesh that the compiler knows of; None without one, or if it is one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def _constrain(x: ArrayLike, *spec) -> ArrayLike:
    return x if _mesh() is None else jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def shard_batch(x: ArrayLike) -> ArrayLike:
    """An array whose rows lie on the devices of their samples."""
    return _constrain(x, AXES)


def replicate(x: ArrayLike) -> ArrayLike:
    return _constrain(x)


def gather_params(params: Any) -> Any:
    """All-gathers parameters for use; expert weights stay sharded.

    Under FSDP this gathers a layer's weights, and its backward pass sums their gradients and scatters them again.
    """
    return jax.tree.map_with_path(lambda path, x: x if "experts" in path_keys(path) else replicate(x), params)


def map_groups(
    function: Callable, tokens: jax.Array, token_mask: jax.Array | None, shared: Any, experts: Any
) -> tuple[jax.Array, Any]:
    """``function(tokens, token_mask, shared, experts)`` → (rows, sums), run by each device for its own routing groups.

    tokens, token_mask: their leading axis lies over all devices; so do the rows that come back. shared: a tree of
    parameters that every device has. experts: a tree of expert weights, of which a device sees its own. sums: a tree
    of ``psum`` values. Without a mesh it is a plain call.
    """
    if _mesh() is None:
        return function(tokens, token_mask, shared, experts)
    rows, everywhere = PartitionSpec(AXES), PartitionSpec()
    mapped = jax.shard_map(
        function,
        in_specs=(rows, None if token_mask is None else rows, everywhere, PartitionSpec("expert")),
        out_specs=(rows, everywhere),
    )
    return mapped(tokens, token_mask, shared, experts)


def map_rows(function: Callable, rows: tuple[jax.Array, ...], shared: tuple[jax.Array, ...]) -> jax.Array:
    """``function(*rows, *shared)`` → rows, run by each device for its own: what the compiler cannot share out, such as
    a kernel. The leading axis of rows lies over all devices; every device has what is shared."""
    if _mesh() is None:
        return function(*rows, *shared)
    of_rows, everywhere = PartitionSpec(AXES), PartitionSpec()
    specs = (of_rows,) * len(rows) + (everywhere,) * len(shared)
    # A kernel's outputs do not say over which axes of the mesh they vary.
    return jax.shard_map(function, in_specs=specs, out_specs=of_rows, check_vma=False)(*rows, *shared)


def as_own(weights: Any) -> Any:
    """Inside ``map_groups``: expert weights, which the devices along ``data`` share, as each device's own.

    Their gradients are then summed over devices in their own type, float32, and not in the type that they are cast to
    where they are used.
    """
    return weights if _mesh() is None else jax.tree.map(lambda w: jax.lax.pcast(w, "data", to="varying"), weights)


def to_experts(slots: jax.Array) -> jax.Array:
    """Inside ``map_groups``: (E, T, D), a device's slots for all experts → (E / devices, devices x T, D), the slots
    of its own experts from all devices of the expert axis."""
    devices = _expert_devices()
    if devices == 1:
        return slots
    num_experts, tokens, width = slots.shape
    sent = _exchange(slots.reshape(devices, num_experts // devices, tokens, width))
    return jnp.swapaxes(sent, 0, 1).reshape(num_experts // devices, devices * tokens, width)


def from_experts(slots: jax.Array) -> jax.Array:
    """The way back of ``to_experts``."""
    devices = _expert_devices()
    if devices == 1:
        return slots
    num_experts, tokens, width = slots.shape
    sent = _exchange(jnp.swapaxes(slots.reshape(num_experts, devices, tokens // devices, width), 0, 1))
    return sent.reshape(devices * num_experts, tokens // devices, width)


def _expert_devices() -> int:
    return 1 if _mesh() is None else _mesh().shape["expert"]


def _exchange(parts: jax.Array) -> jax.Array:
    """(devices, ..): sends the i-th part to the i-th device. Of the leading axis both ways: exchanged along inner axes,
    the TPU compiler lays the slots out anew three times, for an eighth of a step (docs/decisions/model.md)."""
    return jax.lax.all_to_all(parts, "expert", split_axis=0, concat_axis=0, tiled=True)


def psum(tree: Any) -> Any:
    """Inside ``map_groups``: sums over all devices."""
    return tree if _mesh() is None else jax.lax.psum(tree, AXES)


def put_batch(local_batch: dict, mesh: Mesh) -> dict:
    """This process's rows of every array, placed on its devices as one global batch."""
    sharding = over_batch(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), local_batch)


def put_state(tree: Any, shardings: Any) -> Any:
    """The same host values in every process, placed where ``shardings`` says."""

    def put(x: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, shardings)
