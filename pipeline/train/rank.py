"""The parts of one rank of a run, and the order in which they open and close."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping

import jax
from jax.sharding import Mesh

from model import sharding
from model.config import ModelConfig
from model.imp import Imp
from model.step import CompiledStep, compile_step, learning_rates, state_shapes
from model.structure import Structure
from pipeline.errors import DataError, RequestError
from pipeline.files import cache_dir
from pipeline.host_memory import keep_freed_memory
from pipeline.store.path import local_folder, run_path
from pipeline.train.attempts import RankAttempt
from pipeline.train.compiler import StepCompiler
from pipeline.train.devices import use_compile_cache, use_compute_type, world
from pipeline.train.evaluations import Evaluations
from pipeline.train.feed import Feed, RowQueue, close_queues
from pipeline.train.forecast import Forecast, measured_flops_per_s
from pipeline.train.forecast import lines as forecast_lines
from pipeline.train.initial_state import start_state
from pipeline.train.loop import MAX_NON_FINITE, Hooks, Loop
from pipeline.train.memory_fit import MemoryCheck, memory_check
from pipeline.train.mixture.schedule import Schedule
from pipeline.train.mixture.shape_budget import GraphCost, shape_budget, table
from pipeline.train.quarantine import Quarantine
from pipeline.train.saver import Saver, other_machine
from pipeline.train.spec import RunSpec
from pipeline.train.step_gate import StepGate
from pipeline.train.telemetry.recorder import Recorder
from pipeline.train.watchdog import Watchdog
from pipeline.waiting import Wait, waiting_for

# The schedule from the newest checkpoint on → the queue of each task that still runs.
QueueMaker = Callable[[Schedule], dict[str, RowQueue]]


class Rank:
    """One rank of a run; its parts are fields.

    The constructor refuses runs that the devices or the disk cannot hold, before anything is decoded or compiled.
    ``open`` starts the threads and makes the state, ``run`` trains, ``close`` ends the parts in reverse order.
    began: time.perf_counter() of the start.
    """

    compiler: StepCompiler
    quarantine: Quarantine
    feed: Feed
    budget: list[GraphCost]
    forecast: Forecast
    recorder: Recorder
    saver: Saver
    evaluations: Evaluations
    loop: Loop
    memory: MemoryCheck
    plan_lines: list[str]
    _wait: Wait

    def __init__(self, spec: RunSpec, *, rank: int, gate: StepGate, start_step: int | None) -> None:
        self.began = time.perf_counter()
        self.spec = spec
        self.rank = rank
        self.gate = gate
        self.plan_lines = []
        with contextlib.ExitStack() as parts:
            stacks = local_folder(run_path(spec.run_dir), cache_dir()) / "stalls" / f"rank-{rank}.txt"
            self.watchdog = Watchdog(stacks, timeout_s=spec.placement.stall_timeout_s, rank=rank)
            parts.callback(self.watchdog.close)
            self.schedule = spec.schedule(spec.position(start_step))
            self.checkpoints = spec.open_checkpoints()
            parts.callback(self.checkpoints.close)
            self.config = use_compute_type(spec.model)
            self.mesh = run_mesh(self.config, self.schedule, expert_parallel=spec.placement.expert_parallel)
            self.imp = Imp.for_structures(self.config, self.schedule.model_structures)
            self.memory = memory_check(spec.need(self.schedule, self.config))
            self.memory.check_state()
            self.checkpoints.check_space(state_shapes(self.imp, spec.optimizer.freeze))
            self.attempt = self._attempt()
            self._parts = parts.pop_all()

    def open(self, make_queues: QueueMaker) -> None:
        """Opens the queues, starts to decode and to compile, and makes the state that the first step takes."""
        self._wait = self._parts.enter_context(waiting_for("a measure of this machine's speed", quiet=self.rank != 0))
        rate = measured_flops_per_s(self.config) if self.rank == 0 else None
        self._wait.what = "the streams of all tasks"
        queues = make_queues(self.schedule)
        self._parts.callback(close_queues, queues)
        self.evaluations = Evaluations(
            self.spec, self.imp, rank=self.rank, results=self._evaluated, heartbeat=self.watchdog.heartbeat
        )
        self._open_compiler()
        self._open_feed(queues)
        self._wait.what = self._awaited
        self.budget = shape_budget(self.schedule, self.config, self.spec.optimizer.freeze)
        self.forecast = Forecast(self.budget, flops_per_s=rate)
        self._open_recorder()
        start = self.schedule.start
        stored = self.checkpoints.data(start) if start else {}
        self.saver = Saver(
            self.spec, self.schedule, self.checkpoints, stored=stored, rejects_before=self.gate.rejects_before
        )
        state, lines = start_state(self.imp, self.spec, self.checkpoints, start, mesh=self.mesh)
        if self.rank == 0:
            self.plan_lines = forecast_lines(self.forecast, self.memory.need, num_steps=len(self.schedule.steps))
            print("\n".join([table(self.budget), *lines, *other_machine(stored), *self.plan_lines]), flush=True)
        self.watchdog.heartbeat("the state")
        self._make_loop(state)

    def run(self) -> int:
        """Trains. Returns the number of updates since the start of the run, all of them saved."""
        try:
            done = self.loop.run()
        except DataError as e:
            raise DataError(self._how_it_ended(e)) from e
        self.attempt.trained(done, self.loop.times.values())
        self.checkpoints.wait()
        # ``close`` waits for the compiler, which nothing can interrupt.
        self.gate.saved(done, compiles=self.compiler.busy)
        return done

    def close(self) -> None:
        """Closes all parts, the last one opened first, whatever one of them raises."""
        self._parts.close()

    def _attempt(self) -> RankAttempt:
        facts = world() | {"advice": dict(self.spec.logging.feed_advice)}
        return RankAttempt(
            run_path(self.spec.run_dir),
            rank=self.rank,
            start_step=self.schedule.start,
            facts=facts,
            clock_off_s=self.gate.clock_off_s,
        )

    def _open_compiler(self) -> None:
        placement = self.spec.placement
        use_compile_cache(placement.compile_cache)
        if self.memory.need.layout.platform == "cpu":
            keep_freed_memory()
        options = {"mesh": self.mesh, "fsdp": placement.fsdp, "deterministic": placement.deterministic}
        self.compiler = StepCompiler(
            lambda structure: self._compiled(structure, **options),
            self.schedule.in_order_of_first_use(),
            on_compiled=lambda: self.watchdog.heartbeat("compiling"),
        )
        self._parts.callback(self.compiler.close)
        # Neither a long compile nor a slow disk nor an evaluation is a hang.
        self.watchdog.is_patient = lambda: self.compiler.busy or self.checkpoints.saving or self.evaluations.busy

    def _compiled(self, structure: Structure, **options) -> CompiledStep:
        """Compiles a step. Raises RequestError if the devices cannot hold it."""
        try:
            step = compile_step(self.imp, structure, self.spec.optimizer, **options)
        except jax.errors.JaxRuntimeError as e:
            self.memory.check_refusal(structure, e)
            raise
        first = not self.memory.needed
        self.memory.check_step(structure, step.executable.memory_analysis())
        if first and self.rank == 0:
            print(self.memory.compiled_line(), flush=True)
        return step

    def _open_feed(self, queues: Mapping[str, RowQueue]) -> None:
        self.gate.open(self.spec.reject_counts(self.schedule.start))
        self.quarantine = Quarantine(run_path(self.spec.run_dir), rank=self.rank)
        self.feed = Feed(
            self.schedule,
            queues,
            to_devices=lambda arrays: sharding.put_batch(arrays, self.mesh),
            quarantine=self.quarantine,
            gate=self.gate,
            await_graph=self.compiler.await_graph if self.gate.after_compile else None,
        )
        self._parts.callback(self.feed.close)

    def _open_recorder(self) -> None:
        self.recorder = Recorder(
            self.spec.logging,
            run_dir=run_path(self.spec.run_dir),
            rank=self.rank,
            steps=self.schedule.steps,
            flops={(b.task, b.variant): b.flops for b in self.budget},
            shared_encoder=self.config.towers == "shared",
            forecast=self.forecast,
        )
        self._parts.callback(self.recorder.close)

    def _make_loop(self, state: dict) -> None:
        hooks = Hooks(
            record=self._record,
            sync=self.recorder.sync,
            save=self.saver.save,
            evaluate=self.evaluations,
            observe=self.schedule.observe,
            heartbeat=self.watchdog.heartbeat,
        )
        self.loop = Loop(
            state=state,
            feed=self.feed,
            compiler=self.compiler,
            gate=self.gate,
            steps=self.schedule.steps,
            learning_rates=learning_rates(self.spec.optimizer),
            checkpoint_every=self.spec.checkpoints.every,
            evaluate_every=self.spec.logging.evaluate_every,
            hooks=hooks,
            non_finite=self.saver.non_finite,
        )
        self.watchdog.excuse = lambda: self.gate.lacks() if self.loop.waits_for_data else None
        self.watchdog.waits_for = lambda: self.feed.waits_for if self.loop.waits_for_data else None

    def _record(self, values: dict) -> None:
        self._wait.done()
        self.attempt.step(values["step"], self.loop.times.values())
        expected = self.schedule.expected_before(values["step"])[values["task"]]
        alarms = self.compiler.new_alarms()
        self.recorder.record(values | {"expected_steps": round(expected, 3)} | ({"alarms": alarms} if alarms else {}))

    def _evaluated(self, step: int, entries: list[dict]) -> None:
        self.recorder.evaluated(step, entries)
        self.saver.evaluated(step, entries)

    def _awaited(self) -> str:
        """The parts that the first step still waits for, in words."""
        waits_for = self.feed.waits_for
        batch = f"{waits_for}, " if waits_for else ""
        num_graphs = len(set(self.schedule.structures.values()))
        return f"the first step: {batch}{self.compiler.num_compiled} of {num_graphs} graphs compiled"

    def _how_it_ended(self, error: DataError) -> str:
        """The reason for the end, with the outcome of the last save and, after updates that were not finite, the way
        back."""
        reason = str(error)
        try:
            self.checkpoints.wait()
        except DataError as failure:
            reason += f"; and {failure}"
        if max(self.saver.non_finite.values(), default=0) <= MAX_NON_FINITE:
            return reason
        good = self.checkpoints.last_finite_step()
        way_back = "; to go back to it, move those of later steps out of checkpoints/" if good else ""
        return f"{reason}. The newest checkpoint before that is {good or 'none'}{way_back}"


# Fused kernel of attention → the platform that runs it. Others would interpret the TPU's, for days.
_KERNELS = {"cudnn": "gpu", "pallas": "tpu"}


def run_mesh(config: ModelConfig, schedule: Schedule, *, expert_parallel: int) -> Mesh:
    """The mesh of all devices. Raises RequestError if they cannot run a structure of the schedule."""
    backend = jax.devices()[0].platform
    needed = _KERNELS.get(config.attention)
    if needed and (backend, config.dtype) != (needed, "bfloat16"):
        raise RequestError(
            f"model.attention: {config.attention} needs a {needed} and bfloat16; found {backend} and {config.dtype}"
        )
    try:
        mesh = sharding.make_mesh(expert=expert_parallel)
    except ValueError as e:
        raise RequestError(f"cluster.expert_parallel: {e}") from e
    for (task, variant), structure in schedule.structures.items():
        try:
            sharding.check_batch(structure, structure.group_samples(config), mesh)
        except ValueError as e:
            raise RequestError(f"task {task}, variant {variant}: {e}") from e
    return mesh
