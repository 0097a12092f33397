"""Tiny models. Array annotations of model/ are checked here by jaxtyping and beartype; they are free in production."""

import jaxtyping
import pytest

with jaxtyping.install_import_hook("model", "beartype.beartype"):
    from model.config import ModelConfig
    from model.imp import Inputs
    from model.step import compile_step  # noqa: F401  (imports every module of model/ under the hook)


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
    """Inputs of each modality for ``tiny``: a tubelet of one frame has 12 values, a spectrogram patch 4."""

    def make(modality: str, num_tokens: int) -> Inputs:
        num_values, num_axes = {"vision": (12, 3), "audio": (4, 2), "text": (0, 1)}[modality]
        return Inputs(modality, num_tokens=num_tokens, num_values=num_values, num_axes=num_axes)

    return make
