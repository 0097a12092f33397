"""The whole run laid out before step 0: the task, variant and structure of every step (the shape budget)."""

from __future__ import annotations

import dataclasses

import numpy as np

from model.imp import Inputs, Structure
from pipeline.data.plan import TaskPlan, model_modalities
from pipeline.data.spec import DataSetSpec, TaskSpec, TokenSpec, Variant
from pipeline.train.sampler import Multinomial


def structure_of(task: TaskSpec, variant: Variant, data_set: DataSetSpec, tokens: TokenSpec) -> Structure:
    """The compiled graph that a task's variant needs."""
    frames = tokens.vision_patch[0] if variant.num_frames else 1
    values = frames * tokens.vision_patch[1] * tokens.vision_patch[2] * 3
    audio_grid, audio_patch = data_set.audio.grid, data_set.audio.patch
    shapes = {
        "vision": Inputs("vision", variant.num_vision_tokens, values, 3),
        "audio": Inputs("audio", audio_grid[0] * audio_grid[1], audio_patch[0] * audio_patch[1], 2),
        "text": Inputs("text", task.text_length, 0, 1),
    }
    inputs = tuple(shapes[m] for m in model_modalities(task))
    classifier = {}
    if task.classifies:
        counted = task.classes or data_set.classes
        classifier = {
            "classifier": task.data_set,
            "num_classes": len(data_set.classes),
            "classes": tuple(data_set.classes.index(c) for c in counted),
        }
    return Structure(
        task.objectives,
        variant.global_batch_size,
        inputs,
        pair_weights=task.pair_weights,
        microbatches=task.microbatches,
        **classifier,
    )


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step runs. batch: index within the task."""

    task: str
    batch: int
    variant: Variant
    structure: Structure


class Schedule:
    """Task, batch and variant of every step of a run, and the list of structures it will compile.

    num_rows: data set → rows, for the weights and the order.
    """

    def __init__(
        self,
        tasks: dict[str, TaskSpec],
        data_sets: dict[str, DataSetSpec],
        *,
        num_rows: dict[str, int],
        tokens: TokenSpec,
        seed: int,
        num_steps: int,
    ):
        self.tasks, self.num_steps, self.num_rows = tasks, num_steps, num_rows
        weights = {n: num_rows[t.data_set] if t.weight is None else t.weight for n, t in tasks.items()}
        self.sampler = Multinomial(weights, seed=seed)
        self._steps = self.sampler.tasks(0, num_steps)
        totals = self.sampler.counts(num_steps)
        self.plans = {
            n: TaskPlan(t, seed=seed, num_rows=num_rows[t.data_set], num_batches=totals[n]) for n, t in tasks.items()
        }
        self._batches = np.zeros(num_steps, np.int64)
        for index in range(len(tasks)):
            mine = self._steps == index
            self._batches[mine] = np.arange(mine.sum())
        # A task without weight never runs: it gets no structure and no parameters.
        self._structures = {
            (n, v.name): structure_of(t, v, data_sets[t.data_set], tokens)
            for n, t in tasks.items()
            for v in t.variants
            if weights[n] > 0
        }

    def __getitem__(self, step: int) -> Step:
        """Step ``step``, counted from 0."""
        name = self.sampler.names[self._steps[step]]
        batch = int(self._batches[step])
        variant = self.tasks[name].variants[self.plans[name].variants[batch]]
        return Step(name, batch, variant, self._structures[name, variant.name])

    @property
    def structures(self) -> dict[tuple[str, str], Structure]:
        """(task, variant) → structure: everything the run may compile, known before step 0."""
        return self._structures

    def batches_before(self, step: int) -> dict[str, int]:
        """Each task's number of batches in the first ``step`` steps."""
        return self.sampler.counts(step)

    def positions_before(self, step: int) -> dict[str, int]:
        """Each task's sample position after the first ``step`` steps."""
        return {n: int(self.plans[n].starts[k]) for n, k in self.batches_before(step).items()}

    def in_order_of_first_use(self, start: int) -> list[Structure]:
        """The structures that steps from ``start`` on use, each once."""
        found, most = {}, len(set(self._structures.values()))
        for step in range(start, self.num_steps):
            found.setdefault(self[step].structure)
            if len(found) == most:
                break
        return list(found)
