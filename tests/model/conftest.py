"""Tiny models. Array annotations of model/ are checked here by jaxtyping and beartype; they are free in production."""

import functools

import jax
import jaxtyping
import numpy as np
import pytest

with jaxtyping.install_import_hook("model", "beartype.beartype"):
    from model.config import ModelConfig
    from model.step import compile_step  # noqa: F401  (imports every module of model/ under the hook)
    from model.structure import InputShape, Structure


@pytest.fixture(scope="session")
def jit():
    """jax.jit with little optimisation: half the time to compile, and nothing here runs long."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return functools.partial(jax.jit, compiler_options=options)


@pytest.fixture(scope="session")
def tiny():
    """Makes configs that compile fast: two heads of 8, small tables, fields replaced by keyword."""

    def make(**fields) -> ModelConfig:
        sizes = {
            "width": 16,
            "num_heads": 2,
            "head_dim": 8,
            "depth": 1,
            "mlp_dim": 32,
            "common_dim": 12,
            "vocab_size": 40,
            "vision_patch": (4, 2, 2),
            "audio_patch": (2, 2),
            "vision_positions": (4, 4, 4),
            "audio_positions": (8, 4),
            "text_positions": (32,),
        }
        return ModelConfig(**(sizes | fields))

    return make


@pytest.fixture(scope="session")
def inputs():
    """Input shapes of each modality for ``tiny``: a tubelet of one frame has 12 values, a spectrogram patch 4."""

    def make(modality: str, num_tokens: int) -> InputShape:
        num_values, num_axes = {"vision": (12, 3), "audio": (4, 2), "text": (0, 1)}[modality]
        return InputShape(modality, num_tokens=num_tokens, num_values=num_values, num_axes=num_axes)

    return make


@pytest.fixture(scope="session")
def batch():
    """Makes a batch of a structure: random values, texts of every length, one label a sample, no two samples alike."""

    def fill(name: str, shape, rng: np.random.Generator) -> np.ndarray:
        if name == "mask":
            return np.arange(shape.shape[1]) < 1 + rng.integers(0, shape.shape[1], (shape.shape[0], 1))
        if shape.dtype == np.float32:
            return rng.normal(size=shape.shape).astype(np.float32)
        most = 4 if name == "positions" else 256 if shape.dtype == np.uint8 else 40
        return rng.integers(0, most, shape.shape).astype(shape.dtype)

    def make(structure: Structure, *, seed: int = 0) -> dict:
        rng, size = np.random.default_rng(seed), structure.global_batch_size
        shapes = structure.batch_shapes()
        arrays = {
            i.modality: {name: fill(name, shape, rng) for name, shape in shapes[i.modality].items()}
            for i in structure.inputs
        }
        if structure.contrastive:
            arrays["positive_ids"] = np.stack([np.arange(size) % 2, np.arange(size) // 2], axis=-1).astype(np.int32)
        if structure.classification:
            arrays["labels"] = np.eye(structure.num_classes, dtype=np.uint8)[np.arange(size) % structure.num_classes]
        return arrays

    return make
