"""The training loop: batches in, one update a step, metrics out. Knows neither Ray nor files of data."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

from pipeline.errors import DataError
from pipeline.train.compiler import StepCompiler
from pipeline.train.feed import STAGES, Batch, Feed
from pipeline.train.step_gate import NextAction, StepGate
from pipeline.train.telemetry.step_log import to_json_values
from pipeline.train.wait_advice import RANKS

T = TypeVar("T")
# Maximum number of consecutive updates of a task that may be skipped as not finite; after more it has diverged.
MAX_NON_FINITE = 20


@dataclasses.dataclass
class Hooks:
    """Functions that the loop calls.

    record: takes a step's metrics. save: takes (updates done, state); the state may change once it returns, and either
    all processes succeed or all raise DataError. evaluate: takes the same, and is done with the state once it returns.
    sync: called before a save. observe: takes (step counted from 0, loss)
    of every step, in order. heartbeat: takes a few words on the part that was just finished.

    A DataError of one of them ends the run, in all processes after the same step.
    """

    record: Callable[[dict], None]
    save: Callable[[int, dict], None]
    sync: Callable[[], None] = lambda: None
    evaluate: Callable[[int, dict], None] = lambda step, state: None
    observe: Callable[[int, float], None] = lambda step, loss: None
    heartbeat: Callable[[str], None] = lambda finished: None


# What the loop waits for in the name of data: a stage of making the batch, or another rank.
WAITS = (*STAGES, RANKS)


@dataclasses.dataclass
class Times:
    """Seconds that the loop spent on each part, without a gap from its start to the end of its last step or save.

    waits: for data, by what was waited for (``WAITS``). tasks: task → seconds waited for its data.
    """

    compile_wait_s: float = 0.0
    steps_s: float = 0.0
    save_s: float = 0.0
    evaluate_s: float = 0.0
    waits: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(WAITS, 0.0))
    tasks: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    @property
    def data_wait_s(self) -> float:
        """Seconds waited for data, for whatever reason."""
        return sum(self.waits.values())

    def values(self) -> dict:
        """The sums so far as plain values; slowest: the task whose data were waited for longest, None without any."""
        return {
            "steps_s": round(self.steps_s, 6),
            "compile_wait_s": round(self.compile_wait_s, 6),
            "save_s": round(self.save_s, 6),
            "evaluate_s": round(self.evaluate_s, 6),
            "waits": {name: round(value, 6) for name, value in self.waits.items()},
            "slowest": max(self.tasks, key=self.tasks.get) if self.tasks else None,
        }


@dataclasses.dataclass
class _Pending:
    """A step that runs on the device; its metrics are read once the next step has been dispatched."""

    batch: Batch
    metrics: dict
    waits: dict[str, float]
    compile_wait_s: float

    @property
    def data_wait_s(self) -> float:
        return sum(self.waits.values())


class Loop:
    """Alternating gradient descent: each step runs its own task's graph over its own task's groups.

    state: group → {"params", "mu", "nu", "count"}, frozen ones "params" alone; updated in place as steps complete.
    steps: counted from 0, those still to run. learning_rates: of every step of the run, float32. non_finite: task → its
    latest consecutive updates that were not finite, kept up to date. skipped_updates: the number of updates that were
    not finite and left the state as it was. waits_for_data: whether it waits for a batch, its own or another process's.
    """

    def __init__(
        self,
        *,
        state: dict,
        feed: Feed,
        compiler: StepCompiler,
        hooks: Hooks,
        gate: StepGate,
        steps: range,
        learning_rates: np.ndarray,
        checkpoint_every: int,
        evaluate_every: int | None = None,
        non_finite: collections.Counter | None = None,
    ) -> None:
        self.state = state
        self._feed = feed
        self._compiler = compiler
        self._hooks = hooks
        self._gate = gate
        self._steps = steps
        self._learning_rates = learning_rates
        self._checkpoint_every = checkpoint_every
        self._evaluate_every = evaluate_every
        self.times = Times()
        self._ended = time.perf_counter()
        self.skipped_updates = 0
        self.waits_for_data = False
        self._non_finite = collections.Counter() if non_finite is None else non_finite
        self._failure: DataError | None = None
        self._pending: _Pending | None = None
        self._saved = steps.start

    # ORDER CONTRACTS. Each holds across crashes and processes; do not reorder what they name.
    #
    # 1. Journal before substitute. The feed fsyncs a batch's rejects before the batch, which holds their substitutes,
    #    reaches the gate: a resume draws the same substitutes.
    # 2. Gate before step. Every rank asks the gate before it takes a batch and dispatches a step, and dispatches only
    #    what was granted: all ranks end after the same step, none of them inside a collective.
    # 3. Dispatch before read. The metrics of step n are read once step n + 1 is on the device, so the device never
    #    waits for the host. Where the host must wait for a grant, a batch or a compile, it reads them first.
    # 4. Observe, then sync, then save. A save first ends the step that runs: its loss has been observed, so the
    #    position stored is that of the sampler, and its record is on disk before a checkpoint covers it. The state
    #    changes again only after ``save`` has returned.
    # 5. Evaluate before save. A checkpoint holds the score of its own step, and its line of the curve is on disk; the
    #    state changes again only after ``evaluate`` has returned.
    def run(self) -> int:
        """Runs to the last step, or until a stop is asked for; the state is saved either way. Returns updates done.

        Raises DataError if data or storage end the run, its state saved too if possible.
        """
        step = self._steps.start
        self._ended = time.perf_counter()
        while step < self._steps.stop:
            action, others_wait_s = self._next_action(step)
            if action is NextAction.STOP:
                self.times.waits[RANKS] += others_wait_s
                break
            if action is NextAction.SAVE:
                self._save(step)
            try:
                batch, data_wait_s = self._next_batch()
            except DataError as e:
                # With several processes the gate has stopped all of them before this step.
                self._end(e)
                break
            if batch is None or not self._update(step, batch, data_wait_s, others_wait_s):
                # A stop was asked for while this step's batch or graph was waited for.
                break
            step += 1
            if self._evaluate_every and step % self._evaluate_every == 0:
                self._evaluate(step)
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
        """Whether the hook returned; a DataError that it raises ends the run."""
        try:
            hook(*args)
        except DataError as e:
            self._end(e)
            return False
        return True

    def _next_action(self, step: int) -> tuple[NextAction, float]:
        """(the next action, seconds waited for other processes to have their batch)."""
        action = self._gate.next_action(step, wait=False)
        return (action, 0.0) if action is not None else self._wait_for_data(lambda: self._gate.next_action(step))

    def _next_batch(self) -> tuple[Batch | None, float]:
        """(the next batch, seconds waited for it); None if a stop was asked for meanwhile."""
        batch = self._feed.next(wait=False)
        leave = self._gate.leaves
        return (batch, 0.0) if batch is not None else self._wait_for_data(lambda: self._feed.next(leave=leave))

    def _update(self, step: int, batch: Batch, data_wait_s: float, others_wait_s: float) -> bool:
        """Dispatches a step. Returns False, without it, if a stop was asked for while its graph was compiled."""
        # Of the wait for a grant, the part in which this process itself compiled.
        compile_wait_s = min(others_wait_s, batch.graph_s)
        waits = batch.waits(data_wait_s) | {RANKS: others_wait_s - compile_wait_s}
        compiled = self._compiler.ready(batch.plan.structure)
        if compiled is None:
            structure, leave = batch.plan.structure, self._gate.leaves
            compiled, compile_wait_s = self._wait(lambda: self._compiler.get(structure, leave=leave))
            if compiled is None:
                return False
            self._hooks.heartbeat(f"compiling {batch.plan.task}")
        # The profiler's step boundaries.
        with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
            metrics = compiled(self.state, batch.arrays, self._learning_rates[step])
        # The device works on this step while the host reads and writes the metrics of the one before.
        self._finish()
        self._pending = _Pending(batch, metrics, waits, compile_wait_s)
        return True

    def _wait(self, get: Callable[[], T]) -> tuple[T, float]:
        """(the result of ``get``, seconds it took). The step before ends first: the device then waits too."""
        self._finish()
        started = time.perf_counter()
        value = get()
        return value, time.perf_counter() - started

    def _wait_for_data(self, get: Callable[[], T]) -> tuple[T, float]:
        def flagged() -> T:
            self.waits_for_data = True
            try:
                return get()
            finally:
                self.waits_for_data = False

        return self._wait(flagged)

    def _finish(self) -> None:
        """Waits for the step that runs, and records it."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        values = to_json_values(jax.device_get(pending.metrics))
        now = time.perf_counter()
        waited = pending.data_wait_s + pending.compile_wait_s
        # From the end of the step before to the end of this one, less what the device waited for.
        step_s = max(0.0, now - self._ended - waited)
        self._ended = now
        self._count_waits(pending)
        self.times.compile_wait_s += pending.compile_wait_s
        self.times.steps_s += step_s
        self._hooks.heartbeat(f"step {pending.batch.step + 1}")
        self._check_finite(values, pending.batch)
        self._hooks.observe(pending.batch.step, values["loss"])
        self._call(self._hooks.record, self._record(pending, values, step_s))

    def _count_waits(self, pending: _Pending) -> None:
        for name, waited_s in pending.waits.items():
            self.times.waits[name] += waited_s
        if pending.data_wait_s:
            self.times.tasks[pending.batch.plan.task] += pending.data_wait_s

    def _record(self, pending: _Pending, values: dict, step_s: float) -> dict:
        plan = pending.batch.plan
        structure = plan.structure
        if not values.get("losses"):
            values.pop("losses", None)
        return {
            "step": pending.batch.step + 1,
            "task": plan.task,
            "variant": plan.variant.name,
            "loss": values.pop("loss"),
            "chance": float(f"{pending.batch.chance:.7g}"),
            "examples": structure.global_batch_size,
            "tokens": structure.num_tokens,
            "task_steps": plan.batch + 1,
            "step_s": round(step_s, 6),
            "data_wait_s": round(pending.data_wait_s, 6),
            "compile_wait_s": round(pending.compile_wait_s, 6),
            **values,
            "ids": pending.batch.ids,
        }

    def _check_finite(self, values: dict, batch: Batch) -> None:
        self.skipped_updates += not values["finite"]
        # Counted by task: one whose updates never are finite must end the run, however well the others go.
        task = batch.plan.task
        self._non_finite[task] = 0 if values["finite"] else self._non_finite[task] + 1
        if self._non_finite[task] > MAX_NON_FINITE and self._failure is None:
            reason = (
                f"step {batch.step + 1} ({task}): {self._non_finite[task]} updates of this task in a row were not "
                "finite; lower train.learning_rate or look at the task's data"
            )
            self._end(DataError(reason))

    def _evaluate(self, step: int) -> None:
        """Ends the step that runs, and has the state measured."""
        self._finish()
        started = time.perf_counter()
        self._call(self._hooks.evaluate, step, self.state)
        self._hooks.heartbeat(f"evaluating after step {step}")
        evaluated_s = time.perf_counter() - started
        self._ended += evaluated_s
        self.times.evaluate_s += evaluated_s

    def _save(self, step: int) -> None:
        """Ends the step that runs and, unless nothing is new, saves. The arrays are written in the background."""
        self._finish()
        if step == self._saved:
            return
        started = time.perf_counter()
        self._call(self._hooks.sync)
        # A save that failed is tried once more when the run ends.
        if self._call(self._hooks.save, step, self.state):
            self._saved = step
        self._hooks.heartbeat(f"saving after step {step}")
        saved_s = time.perf_counter() - started
        # Left out of the step to come, which the rest of the time since the last one counts towards.
        self._ended += saved_s
        self.times.save_s += saved_s
