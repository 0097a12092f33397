"""Features of prepared samples, the same whatever else is asked for: in any order, alone or among others.

The model is always called with whole batches of one size for a sample's number of tokens, the last one filled up with
copies, and routes by sample: no value depends on which samples share a call.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, Self

import jax
import numpy as np

from model.imp import Imp

# Samples in a call of the model and of its heads.
BATCH = 64
# Tokens that a call on a CPU has at least, if that takes no more than BATCH samples: a single picture does not cost 64.
_CPU_TOKENS = 1024


class Features:
    """A model with its parameters: pooled features, places in common spaces, logits."""

    def __init__(self, imp: Imp, params: dict) -> None:
        self.imp, self.params, self._dim = imp, params, imp.config.common_dim
        # Routing is by sample here, whatever it was in training: a result never depends on its neighbours.
        self._encode = jax.jit(
            lambda params, modality, arrays: imp.encode(
                params, modality, arrays["tokens"], arrays["positions"], arrays.get("mask")
            ),
            static_argnums=1,
        )
        self._project = jax.jit(
            lambda params, features, source, target: imp.project(params, features, source=source, target=target),
            static_argnums=(2, 3),
        )
        self._logits = jax.jit(
            lambda params, features, name: imp.module(params, f"classifier_{name}")(features), static_argnums=2
        )

    @property
    def fewer_dims(self) -> tuple[int, ...]:
        """The numbers of leading dimensions of common spaces that were trained to be of use alone."""
        return self.imp.config.matryoshka[:-1]

    def features(self, modality: str, samples: list[dict]) -> np.ndarray:
        """(n, width) float32 pooled features. samples: {"tokens", "positions"[, "mask"]} of one shape."""
        size = batch_size(len(samples[0]["tokens"]))
        batches = _batches({name: np.stack([s[name] for s in samples]) for name in samples[0]}, size)
        return _joined(lambda arrays: self._encode(self.params, modality, arrays), batches)

    def project(self, features: np.ndarray, *, source: str, target: str) -> np.ndarray:
        """(n, K) in the common space of a pair, before normalisation."""
        batches = _batches({"features": features}, BATCH)
        found = _joined(lambda arrays: self._project(self.params, arrays["features"], source, target), batches)
        return found[:, : self._dim]

    def at_dim(self, dim: int) -> Self:
        """The same model, whose common spaces have their leading dimensions alone."""
        other = copy.copy(self)
        other._dim = dim
        return other

    def logits(self, features: np.ndarray, data_set: str) -> np.ndarray:
        """(n, classes of the data set)."""
        batches = _batches({"features": features}, BATCH)
        return _joined(lambda arrays: self._logits(self.params, arrays["features"], data_set), batches)

    def temperature(self, a: str, b: str) -> float:
        """The temperature at which two modalities are compared."""
        return float(self.imp.temperature(self.params, a, b))


class Pools(Protocol):
    """Makes one vector of each sample."""

    def features(self, modality: str, samples: list[dict]) -> np.ndarray:
        """(n, width) float32."""
        ...


def pooled(model: Pools, modality: str, samples: Iterator[dict]) -> np.ndarray:
    """(n, width) float32 of samples that are made on demand, (0, 0) of none. One call's are in memory at a time."""
    parts = []
    while part := list(itertools.islice(samples, BATCH)):
        parts.append(model.features(modality, part))
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)


def batch_size(num_tokens: int) -> int:
    """Samples in a call of the encoder."""
    if jax.default_backend() != "cpu":
        return BATCH
    wanted = -(-_CPU_TOKENS // num_tokens)
    return min(BATCH, 1 << (wanted - 1).bit_length())


def _batches(arrays: dict[str, np.ndarray], size: int) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """(arrays of ``size`` rows, the number of them that count). The last is filled up with copies of the last row."""
    count = len(next(iter(arrays.values())))
    for first in range(0, count, size):
        rows = np.minimum(np.arange(first, first + size), count - 1)
        yield {name: array[rows] for name, array in arrays.items()}, min(size, count - first)


def _joined(call: Callable[[dict], jax.Array], batches: Iterable[tuple[dict, int]]) -> np.ndarray:
    return np.concatenate([np.asarray(call(arrays))[:count] for arrays, count in batches])


def unit(x: np.ndarray) -> np.ndarray:
    """Vectors at unit length."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


def mean_over_clips(function: Callable[[np.ndarray], np.ndarray], features: np.ndarray) -> np.ndarray:
    """``function`` of (n, width) over (rows, clips, width): the mean over the clips of a row, (rows, ...)."""
    rows, clips, width = features.shape
    values = function(features.reshape(rows * clips, width))
    return values.reshape(rows, clips, -1).mean(1)


def class_anchors(projected: np.ndarray, num_prompts: int) -> np.ndarray:
    """(classes, K) of unit length: the mean over a class's prompts, each of unit length (Radford et al. 2021, CLIP).

    projected: (classes x prompts, K), the prompts of a class beside each other.
    """
    return unit(unit(projected).reshape(-1, num_prompts, projected.shape[-1]).mean(1))
