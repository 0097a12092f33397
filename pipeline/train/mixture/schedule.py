"""The whole run laid out before step 0: the task, variant and structure of every step."""

from __future__ import annotations

import dataclasses
import functools
import threading

import numpy as np

from model.structure import Structure
from pipeline.data.plan import TaskPlan
from pipeline.data.run_data import DataSpec
from pipeline.data.spec import Variant
from pipeline.train.mixture.samplers import make_sampler
from pipeline.train.mixture.spec import SamplerSpec
from pipeline.train.mixture.structures import structure_of


@dataclasses.dataclass(frozen=True)
class MixtureSpec:
    """The mixture of tasks over the steps. seed: of the order of samples and of the initial parameters too."""

    seed: int
    num_steps: int
    sampler: SamplerSpec = dataclasses.field(default_factory=SamplerSpec)


@dataclasses.dataclass(frozen=True)
class Step:
    """The assignment of one step. batch: index within the task."""

    task: str
    batch: int
    variant: Variant
    structure: Structure


@dataclasses.dataclass(frozen=True)
class Position:
    """The progress of a run, as stored in a checkpoint.

    batches: task → number of batches so far, also of tasks that have left the recipe and may return. expected: task →
    number of steps that its weight has promised so far. sampler: ``Sampler.state``.
    """

    step: int = 0
    batches: dict[str, int] = dataclasses.field(default_factory=dict)
    expected: dict[str, float] = dataclasses.field(default_factory=dict)
    sampler: dict = dataclasses.field(default_factory=dict)


START = Position()


class Schedule:
    """Task, batch and variant of every step of a run from ``position`` on, and the structures it will compile.

    With an adaptive sampler only the steps below ``decided_until`` are decided; ``observe`` decides more. Safe to read
    in one thread while another observes.
    """

    def __init__(self, data: DataSpec, mixture: MixtureSpec, position: Position = START):
        tasks, num_rows = data.tasks, data.num_rows
        seed, num_steps = mixture.seed, mixture.num_steps
        sampler = mixture.sampler
        self.tasks = tasks
        self.num_rows = num_rows
        self.num_steps = num_steps
        self.position = position
        self.start = position.step
        self.weights = sampler.weights(tasks, num_rows)
        self.sampler = make_sampler(
            sampler, self.weights, seed=seed, position=position.sampler, step=self.start, num_steps=num_steps
        )
        self._done = {n: position.batches.get(n, 0) for n in tasks}
        self._grown = threading.Condition()
        # Of the steps from the start on, the first ``_decided`` of which hold: task index, and batch within the task.
        left = max(0, num_steps - self.start)
        self._steps = np.zeros(left, np.int32)
        self._batches = np.zeros(left, np.int64)
        self._decided = 0
        self._counts = np.array(list(self._done.values()), np.int64)
        self._grow()
        self.plans = {
            n: TaskPlan(t, seed=seed, num_rows=num_rows[t.data_set], num_batches=self.batches_at_most(n))
            for n, t in tasks.items()
        }
        # A task that never runs gets no structure to compile; what it has learned before stays in the model.
        running = sampler.runs(tasks)
        every = {
            (n, v.name): structure_of(t, v, data.data_sets[t.data_set], data.tokens)
            for n, t in tasks.items()
            for v in t.variants
        }
        self._structures = {key: s for key, s in every.items() if key[0] in running}
        self.model_structures = [s for (n, _), s in every.items() if n in running or self._done[n]]
        self._expected = (self.start, np.array([position.expected.get(n, 0.0) for n in tasks]))

    @property
    def steps(self) -> range:
        """The steps of this run from its position to its end."""
        return range(self.start, self.num_steps)

    @property
    def decided_until(self) -> int:
        """The first step whose task is not decided yet."""
        return self.start + self._decided

    @property
    def adaptive(self) -> bool:
        """Whether losses decide which task a later step runs."""
        return self.sampler.adaptive

    def _grow(self) -> None:
        stop = int(min(self.num_steps, self.sampler.decided_until))
        if stop <= self.decided_until:
            return
        more, end = self.sampler.tasks(self.decided_until, stop), stop - self.start
        self._steps[self._decided : end] = more
        batches = self._batches[self._decided : end]
        for index in range(len(self.tasks)):
            mine = np.flatnonzero(more == index)
            batches[mine] = self._counts[index] + np.arange(len(mine))
            self._counts[index] += len(mine)
        with self._grown:
            self._decided = end
            self._grown.notify_all()

    def observe(self, step: int, loss: float) -> None:
        """Takes the loss of a step (counted from 0), in order of the steps; an adaptive sampler learns from it."""
        if self.adaptive:
            self.expected_before(step + 1)
            self.sampler.observe(step, self[step].task, loss)
            self._grow()

    def wait(self, step: int, *, timeout_s: float) -> bool:
        """Waits until step ``step`` is decided. Returns False if it still is not after ``timeout_s``."""
        with self._grown:
            return self._grown.wait_for(lambda: step < self.decided_until, timeout_s)

    def __getitem__(self, step: int) -> Step:
        """Step ``step``, counted from 0 over the whole run."""
        name = self.sampler.names[self._steps[step - self.start]]
        batch = int(self._batches[step - self.start])
        variant = self.tasks[name].variants[self.plans[name].variants[batch]]
        return Step(name, batch, variant, self._structures[name, variant.name])

    @property
    def structures(self) -> dict[tuple[str, str], Structure]:
        """(task, variant) → structure: everything that the run may compile, known before its first step."""
        return self._structures

    def batches_before(self, step: int) -> dict[str, int]:
        """Each task's number of batches in the first ``step`` steps of the run."""
        counts = np.bincount(self._steps[: min(step - self.start, self._decided)], minlength=len(self.tasks))
        return {n: done + int(count) for (n, done), count in zip(self._done.items(), counts, strict=True)}

    def batches_at_most(self, task: str) -> int:
        """Maximum number of batches of a task at the end of the run; exact once all steps are decided."""
        return self.batches_before(self.decided_until)[task] + self.num_steps - self.decided_until

    def expected_before(self, step: int) -> dict[str, float]:
        """Number of the first ``step`` steps that each task's weight promises it. Call it with increasing steps."""
        last, expected = self._expected
        if step > last:
            expected = expected + self.sampler.expected(last, step)
            self._expected = (step, expected)
        return dict(zip(self.tasks, expected.tolist(), strict=True))

    def share(self, task: str) -> float:
        """The task's expected share of the steps to come."""
        return self._shares[task]

    @functools.cached_property
    def _shares(self) -> dict[str, float]:
        expected = self.sampler.expected(self.start, self.num_steps) / max(1, self.num_steps - self.start)
        return dict(zip(self.tasks, expected.tolist(), strict=True))

    def positions_before(self, step: int) -> dict[str, int]:
        """Each task's sample position after the first ``step`` steps."""
        return {n: int(self.plans[n].starts[k]) for n, k in self.batches_before(step).items()}

    def position_at(self, step: int) -> Position:
        """The position after ``step`` steps, all of whose losses must have been observed."""
        batches = {**self.position.batches, **self.batches_before(step)}
        expected = {**self.position.expected, **self.expected_before(step)}
        return Position(step, batches, expected, self.sampler.state())

    def in_order_of_first_use(self) -> list[Structure]:
        """The structures that the run may still use, each once: those of decided steps in their order, then all others
        if steps remain undecided."""
        max_variants = max(len(t.variants) for t in self.tasks.values())
        keys = self._steps[: self._decided].astype(np.int64) * max_variants
        for index, name in enumerate(self.tasks):
            mine = np.flatnonzero(self._steps[: self._decided] == index)
            keys[mine] += self.plans[name].variants[self._batches[mine]]
        _, firsts = np.unique(keys, return_index=True)
        found = dict.fromkeys(self[self.start + int(first)].structure for first in sorted(firsts))
        if self.decided_until < self.num_steps:
            found |= dict.fromkeys(self._structures.values())
        return list(found)
