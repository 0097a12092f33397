"""The training loop: batches in, one update a step, metrics out. Knows neither Ray nor files of data."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np

from pipeline.errors import DataError
from pipeline.train.compiler import StepCompiler
from pipeline.train.feed import Batch, Feed
from pipeline.train.step_gate import Gate, Go
from pipeline.train.telemetry.step_log import plain

# Maximum number of updates of a task in a row that may be skipped as not finite; more, and it has diverged.
MOST_NON_FINITE = 20


@dataclasses.dataclass
class Hooks:
    """What the loop calls. record: a step's metrics. save: (updates done, state); the state may change once it returns,
    and all processes do it alike or raise DataError alike. sync: before a save. observe: (step counted from 0, loss) of
    every step, in order. beat: in a few words, what was finished just now.

    A DataError of one of them ends the run, in all processes after the same step.
    """

    record: Callable[[dict], None]
    save: Callable[[int, dict], None]
    sync: Callable[[], None] = lambda: None
    observe: Callable[[int, float], None] = lambda step, loss: None
    beat: Callable[[str], None] = lambda what: None


@dataclasses.dataclass
class Times:
    """Where the loop's time went, in seconds."""

    data_wait_s: float = 0.0
    compile_wait_s: float = 0.0
    steps_s: float = 0.0
    save_s: float = 0.0


@dataclasses.dataclass
class _Pending:
    """A step that runs on the device; its metrics are read once the next step has been sent off."""

    batch: Batch
    metrics: dict
    data_wait_s: float
    compile_wait_s: float


class Loop:
    """Alternating gradient descent: each step runs its own task's graph over its own task's groups.

    state: group → {"params", "mu", "nu", "count"}; updated in place as steps complete. learning_rates: of every step of
    the run, float32. non_finite: task → its last updates in a row that were not finite, kept up to date.
    skipped_updates: how many were not finite and left the state as it was.
    """

    def __init__(
        self,
        *,
        state: dict,
        feed: Feed,
        compiler: StepCompiler,
        hooks: Hooks,
        gate: Gate,
        start_step: int,
        num_steps: int,
        learning_rates: np.ndarray,
        checkpoint_every: int,
        non_finite: collections.Counter | None = None,
    ):
        self.state, self._feed, self._compiler, self._hooks, self._gate = state, feed, compiler, hooks, gate
        self._range, self._checkpoint_every = (start_step, num_steps), checkpoint_every
        self._learning_rates = learning_rates
        self.times, self._ended = Times(), time.perf_counter()
        self.skipped_updates, self._non_finite = 0, collections.Counter() if non_finite is None else non_finite
        self._failure: DataError | None = None
        self._pending: _Pending | None = None
        self._saved = start_step

    def run(self) -> int:
        """Runs to the last step, or until a stop is asked for; the state is saved either way. Returns updates done.

        Raises DataError where data or storage end the run, its state saved too where it can be.
        """
        step = self._range[0]
        self._ended = time.perf_counter()
        while step < self._range[1]:
            go, others_wait_s = self._ask(step)
            if go is Go.STOP:
                break
            if go is Go.SAVE:
                self._save(step)
            try:
                batch, data_wait_s = self._next_batch()
            except DataError as e:
                # With several processes the gate has stopped all of them before this step.
                self._end(e)
                break
            data_wait_s += others_wait_s
            self._update(step, batch, data_wait_s)
            step += 1
            if step % self._checkpoint_every == 0:
                self._save(step)
        self._save(step)
        if self._failure is not None:
            raise self._failure
        return step

    def _end(self, error: DataError) -> None:
        """Ends the run at the gate: a process that left by itself would leave the others in the middle of a step."""
        if self._failure is None:
            self._failure = error
        elif str(error) not in str(self._failure):
            self._failure = DataError(f"{self._failure}; and {error}")
        self._gate.end(error)

    def _call(self, hook: Callable, *args) -> bool:
        """Whether the hook returned; what it raises ends the run."""
        try:
            hook(*args)
        except DataError as e:
            self._end(e)
            return False
        return True

    def _ask(self, step: int) -> tuple[Go, float]:
        """(what to do, seconds waited for other processes to have their batch)."""
        go = self._gate.go(step, wait=False)
        return (go, 0.0) if go is not None else self._wait(lambda: self._gate.go(step))

    def _next_batch(self) -> tuple[Batch, float]:
        """(the next batch, seconds waited for it)."""
        batch = self._feed.next(wait=False)
        return (batch, 0.0) if batch is not None else self._wait(self._feed.next)

    def _update(self, step: int, batch: Batch, data_wait_s: float) -> None:
        compiled, compile_wait_s = self._compiler.ready(batch.what.structure), 0.0
        if compiled is None:
            compiled, compile_wait_s = self._wait(lambda: self._compiler.get(batch.what.structure))
            self._hooks.beat(f"compiling {batch.what.task}")
        metrics = compiled(self.state, batch.arrays, self._learning_rates[step])
        # The device works on this step while the host reads and writes the metrics of the one before.
        self._finish()
        self._pending = _Pending(batch, metrics, data_wait_s, compile_wait_s)

    def _wait(self, get: Callable):
        """(what ``get`` returns, seconds it took). The step before ends first: the device then waits too."""
        self._finish()
        started = time.perf_counter()
        value = get()
        return value, time.perf_counter() - started

    def _finish(self) -> None:
        """Waits for the step that runs, and records it."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        values = plain(jax.device_get(pending.metrics))
        now = time.perf_counter()
        waited = pending.data_wait_s + pending.compile_wait_s
        # From the end of the step before to the end of this one, less what the device waited for.
        step_s = max(0.0, now - self._ended - waited)
        self._ended = now
        self.times.data_wait_s += pending.data_wait_s
        self.times.compile_wait_s += pending.compile_wait_s
        self.times.steps_s += step_s
        self._hooks.beat(f"step {pending.batch.step + 1}")
        self._check_finite(values, pending.batch)
        self._hooks.observe(pending.batch.step, values["loss"])
        self._call(self._hooks.record, self._record(pending, values, step_s))

    def _record(self, pending: _Pending, values: dict, step_s: float) -> dict:
        what = pending.batch.what
        structure = what.structure
        if not values.get("losses"):
            values.pop("losses", None)
        return {
            "step": pending.batch.step + 1,
            "task": what.task,
            "variant": what.variant.name,
            "loss": values.pop("loss"),
            "chance": float(f"{pending.batch.chance:.7g}"),
            "examples": structure.global_batch_size,
            "tokens": structure.num_tokens,
            "task_steps": what.batch + 1,
            "step_s": round(step_s, 6),
            "data_wait_s": round(pending.data_wait_s, 6),
            "compile_wait_s": round(pending.compile_wait_s, 6),
            **values,
            "ids": pending.batch.ids,
        }

    def _check_finite(self, values: dict, batch: Batch) -> None:
        self.skipped_updates += not values["finite"]
        # By task: one whose updates never are must end the run, however well the others go.
        task = batch.what.task
        self._non_finite[task] = 0 if values["finite"] else self._non_finite[task] + 1
        if self._non_finite[task] > MOST_NON_FINITE and self._failure is None:
            reason = (
                f"step {batch.step + 1} ({task}): {self._non_finite[task]} updates of this task in a row were not "
                "finite; lower train.learning_rate or look at the task's data"
            )
            self._end(DataError(reason))

    def _save(self, step: int) -> None:
        """Ends the step that runs and saves, where there is anything new. The arrays are written in the background."""
        self._finish()
        if step == self._saved:
            return
        started = time.perf_counter()
        self._call(self._hooks.sync)
        # One that was refused is tried once more where the run ends.
        if self._call(self._hooks.save, step, self.state):
            self._saved = step
        self._hooks.beat(f"saving after step {step}")
        self._ended = time.perf_counter()
        self.times.save_s += self._ended - started
