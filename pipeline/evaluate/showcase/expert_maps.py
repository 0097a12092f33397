"""Which expert took which patch of a row."""

from __future__ import annotations

import jax
import numpy as np

from model.routes import routes
from pipeline.data.spec import AudioSpec
from pipeline.evaluate.showcase.sample import Sample
from pipeline.evaluate.trained_model import TrainedModel


def expert_map(model: TrainedModel, sample: Sample, modality: str) -> dict | None:
    """{"title", "picture", "num_experts", "layers": [rows of experts, -1 for none]} of the first row.

    None for a dense model, and for tokens that do not lie in a grid.
    """
    grid, moe = _grid(sample, modality), model.imp.config.moe
    tokens = sample.tokens[modality]
    picture = sample.pictures[modality][0]
    if moe is None or grid is None or not picture or int(np.prod(grid)) != len(tokens["tokens"]):
        return None
    name = sample.embedder(modality)
    find = jax.jit(lambda params, tokens, positions: routes(model.imp, params, name, tokens, positions))
    found = np.asarray(find(model.params, tokens["tokens"], tokens["positions"]))
    if isinstance(sample.data_set.settings(modality), AudioSpec):
        # Time to the right, low tones at the bottom, as in the spectrogram.
        layers = [layer.reshape(grid[1:]).T[::-1] for layer in found]
    else:
        # The time steps of a film beside each other.
        layers = [np.concatenate(list(layer.reshape(grid)), axis=1) for layer in found]
    title = f"{sample.data_set.name}: {modality}, {sample.truth(0)}"
    return {
        "title": title,
        "picture": picture,
        "num_experts": moe.num_experts,
        "layers": [layer.tolist() for layer in layers],
    }


def _grid(sample: Sample, modality: str) -> tuple[int, int, int] | None:
    """(time steps, rows, columns) of the tokens."""
    settings = sample.data_set.settings(modality)
    if isinstance(settings, AudioSpec):
        return (1, *settings.grid)
    return sample.variants[modality].grid if sample.embedder(modality) == "vision" else None
