"""model.safetensors of an exported model: float32 arrays by names such as ``encoder/dense/attention/qkv/kernel``."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from pipeline.errors import RequestError, one_line

PARAMETERS = "model.safetensors"


def named_arrays(params: dict, shapes: dict) -> dict[str, np.ndarray]:
    """Parameters by name. Raises ValueError where they are not those of ``shapes``."""
    arrays = {name: np.asarray(value, order="C") for name, value in _by_name(params).items()}
    if wrong := _difference(_layout(_by_name(shapes)), _layout(arrays)):
        raise ValueError(f"parameters: {wrong}")
    return arrays


def read_parameters(path: Path, shapes: dict) -> dict:
    """Parameters as ``shapes`` has them, on jax's default device. Raises RequestError."""
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            found = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
            if wrong := _difference(_layout(_by_name(shapes)), found):
                raise RequestError(f"{path}: {wrong}; is it of the same export as config.json?")
            return jax.tree.map_with_path(lambda at, _: jnp.asarray(file.get_tensor(_name(at))), shapes)
    except OSError as e:
        raise RequestError(f"{path}: expected the model's parameters, found {e.strerror or one_line(e)}") from e
    except SafetensorError as e:
        size = path.stat().st_size
        raise RequestError(f"{path}: expected a whole safetensors file, found {size} bytes: {one_line(e)}") from e


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
