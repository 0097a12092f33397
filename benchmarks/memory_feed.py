"""The training loop over batches in memory, shared by the benchmarks of the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from model.structure import Structure
from pipeline.data.spec import Variant
from pipeline.train.feed import Batch
from pipeline.train.loop import Hooks, Loop
from pipeline.train.mixture.schedule import Step
from pipeline.train.step_gate import StepGate


class Batches(dict):
    """Structure → a batch of random values on the device."""

    def __init__(self, structures: list[Structure]):
        super().__init__()
        for number, structure in enumerate(structures):
            arrays = jax.device_put(_arrays(structure, np.random.default_rng(number)))
            variant = Variant("memory", structure.global_batch_size)
            self[structure] = Batch(0, Step(f"task_{number}", 0, variant, structure), arrays, [], chance=0.0)


def _arrays(structure: Structure, rng: np.random.Generator) -> dict:
    """Values that every embedder takes: small whole numbers, masks of ones."""

    def fill(shape) -> np.ndarray:
        if shape.dtype == np.bool_:
            return np.ones(shape.shape, bool)
        if np.issubdtype(shape.dtype, np.floating):
            return rng.normal(size=shape.shape).astype(shape.dtype)
        return rng.integers(0, 8, shape.shape).astype(shape.dtype)

    return jax.tree.map(fill, structure.batch_shapes())


class _Feed:
    def __init__(self, batches: list[Batch]):
        self._batches = iter(dataclasses.replace(batch, step=step) for step, batch in enumerate(batches))

    def next(self, *, wait: bool = True) -> Batch:
        return next(self._batches)


class _Compiled:
    def __init__(self, steps: dict):
        self._steps = steps

    def ready(self, structure: Structure) -> Callable:
        return self._steps[structure]


def make_loop(state: dict, batches: list[Batch], steps: dict, *, record=None, save=None, checkpoint_every=None) -> Loop:
    """A loop over these batches, one a step. state: changes in place. steps: structure → compiled step."""
    return Loop(
        state=state,
        feed=_Feed(batches),
        compiler=_Compiled(steps),
        gate=StepGate(),
        hooks=Hooks(record=record or (lambda values: None), save=save or (lambda step, state: None)),
        steps=range(len(batches)),
        learning_rates=np.full(len(batches), 1e-4, np.float32),
        checkpoint_every=checkpoint_every or len(batches) + 1,
    )
