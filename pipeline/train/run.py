"""One rank of a run, from its start or its last checkpoint to its end. Knows nothing of Ray: queues come in."""

from __future__ import annotations

import base64
import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh

from model import sharding
from model.config import ModelConfig
from model.imp import Imp
from model.step import OptimizerConfig, compile_step, state_shapes
from pipeline.data.media.machine import cpu_kind
from pipeline.data.spec import DataSetSpec, TaskSpec, TokenSpec
from pipeline.errors import DataError, RequestError
from pipeline.host_memory import keep_freed_memory
from pipeline.train.budget import shape_budget, table
from pipeline.train.checkpoint import Checkpoints
from pipeline.train.compiler import StepCompiler
from pipeline.train.feed import Feed, RowQueue, close_queues
from pipeline.train.forecast import Forecast, measured_flops_per_s, needed_bytes
from pipeline.train.forecast import lines as forecast_lines
from pipeline.train.gate import Gate
from pipeline.train.loop import MOST_NON_FINITE, Hooks, Loop
from pipeline.train.quarantine import Quarantine
from pipeline.train.recorder import LoggingSpec, Recorder
from pipeline.train.sampler import SamplerSpec
from pipeline.train.schedule import START, Position, Schedule
from pipeline.train.start import start_state
from pipeline.train.watchdog import Watchdog
from pipeline.waiting import waiting_for


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """A whole run as plain data; ``prepare.prepare`` makes it from a recipe. Travels to workers.

    fingerprints: data set → what its training rows are (``data.columns.Fingerprint.digests``). config: the resolved
    recipe, stored in checkpoints.
    expert_parallel, fsdp: how parameters lie over the devices (``model.sharding``). init_step: of the checkpoint of
    ``init_from`` that a new run begins with. deterministic: see ``step.compile_step``.
    """

    run_dir: str
    config: dict
    tasks: dict[str, TaskSpec]
    data_sets: dict[str, DataSetSpec]
    tokens: TokenSpec
    fingerprints: dict[str, dict]
    tokenizer: bytes | None
    model: ModelConfig
    optimizer: OptimizerConfig
    seed: int
    num_steps: int
    checkpoint_every: int
    keep_last: int
    keep_every: int | None
    logging: LoggingSpec
    compile_cache: str | None
    expert_parallel: int
    fsdp: bool
    deterministic: bool
    sampler: SamplerSpec
    stall_timeout_s: float
    init_from: str | None
    init_step: int | None

    def checkpoints(self) -> Checkpoints:
        return Checkpoints(Path(self.run_dir), keep_last=self.keep_last, keep_every=self.keep_every)

    def position(self, step: int | None = None) -> Position:
        """Where the checkpoint of a step stands, or the newest; the start of the run where there is none.

        Raises RequestError where a data set has other rows than then.
        """
        checkpoints = self.checkpoints()
        step = checkpoints.latest_step if step is None else step
        if not step:
            return START
        data = checkpoints.data(step)
        for name, now in self.fingerprints.items():
            if fault := _other_rows(data["fingerprints"].get(name, now), now):
                raise RequestError(
                    f"data_sets.{name}: {fault}, and the order of samples and what they teach depend on it; put the "
                    "old rows back, or give the new ones a data set of their own"
                )
        return Position(**data["position"])

    @property
    def num_rows(self) -> dict[str, int]:
        """Data set → rows of its training manifest."""
        return {name: fingerprint["num_rows"] for name, fingerprint in self.fingerprints.items()}

    def schedule(self, position: Position) -> Schedule:
        """The run from a position to its end."""
        return Schedule(
            self.tasks,
            self.data_sets,
            num_rows=self.num_rows,
            tokens=self.tokens,
            seed=self.seed,
            num_steps=self.num_steps,
            sampler=self.sampler,
            position=position,
        )


def _other_rows(then: dict, now: dict) -> str | None:
    """The difference between the fingerprints of a data set when the run began and now, in words."""
    if then["num_rows"] != now["num_rows"]:
        return f"the run began with {then['num_rows']} rows, the manifest now has {now['num_rows']}"
    differ = [name for name in then if then[name] != now.get(name)]
    if not differ:
        return None
    return f"the rows are not those that the run began with: {', '.join(differ)} differ, or come in another order"


def use_compute_type(config: ModelConfig) -> ModelConfig:
    """dtype "auto" as this machine wants it: bfloat16 on accelerators, float32 on CPUs."""
    if config.dtype != "auto":
        return config
    return dataclasses.replace(config, dtype="float32" if jax.default_backend() == "cpu" else "bfloat16")


# The schedule from the newest checkpoint on → the queue of each task that still runs.
QueueMaker = Callable[[Schedule], dict[str, RowQueue]]


def train(
    spec: RunSpec,
    make_queues: QueueMaker,
    *,
    rank: int = 0,
    gate: Gate | None = None,
    start_step: int | None = None,
) -> dict:
    """Runs one rank to the end of the run, or until its gate says stop. Returns the summary (see ``_summary``).

    start_step: of the checkpoint to go on from, which all ranks must agree on; None: the newest.
    Raises RequestError where the devices, the disk or what ``init_from`` names cannot serve the run; DataError where
    the data end it, its state saved.
    """
    began, gate = time.perf_counter(), gate or Gate()
    watchdog = Watchdog(Path(spec.run_dir) / "stalls" / f"rank-{rank}.txt", timeout_s=spec.stall_timeout_s, rank=rank)
    with contextlib.ExitStack() as stack:
        stack.callback(watchdog.close)
        position = spec.position(start_step)
        return _train(spec, make_queues, position, rank=rank, gate=gate, watchdog=watchdog, began=began, stack=stack)


def _train(spec: RunSpec, make_queues: QueueMaker, position, *, rank, gate, watchdog, began, stack) -> dict:
    """stack: closes what is opened here, the last first, whatever one of them raises."""
    run_dir, config = Path(spec.run_dir), use_compute_type(spec.model)
    checkpoints = spec.checkpoints()
    stack.callback(checkpoints.close)
    schedule = spec.schedule(position)
    start = schedule.start
    mesh = _mesh(spec, config, schedule)
    imp = Imp.for_structures(config, schedule.model_structures)
    checkpoints.check_space(state_shapes(imp))
    wait = stack.enter_context(waiting_for("this machine's rate", quiet=rank != 0))
    rate = measured_flops_per_s(config) if rank == 0 else None
    wait.what = "the streams of all tasks"
    queues = make_queues(schedule)
    stack.callback(close_queues, queues)
    _use_compile_cache(spec.compile_cache)
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    compiler = StepCompiler(
        lambda structure: compile_step(
            imp, structure, spec.optimizer, mesh=mesh, fsdp=spec.fsdp, deterministic=spec.deterministic
        ),
        schedule.in_order_of_first_use(),
        built=lambda: watchdog.beat("compiling"),
    )
    stack.callback(compiler.close)
    # Neither a long compile nor a slow disk is a hang.
    watchdog.patient = lambda: compiler.busy or checkpoints.saving
    quarantine = Quarantine(
        run_dir, rank=rank, limits={name: d.max_reject_fraction for name, d in spec.data_sets.items()}
    )
    feed = Feed(
        schedule,
        queues,
        start=start,
        stop=spec.num_steps,
        quarantine=quarantine,
        gate=gate,
        put=lambda arrays: sharding.put_batch(arrays, mesh),
    )
    stack.callback(feed.close)
    wait.what = lambda: _what_starts(feed, compiler, len(set(schedule.structures.values())))
    budget = shape_budget(schedule, config)
    forecast = Forecast(budget, flops_per_s=rate)
    recorder = Recorder(
        spec.logging,
        run_dir=run_dir,
        rank=rank,
        start_step=start,
        num_steps=spec.num_steps,
        flops={(b.task, b.variant): b.flops for b in budget},
        shared_encoder=config.towers == "shared",
        forecast=forecast,
    )
    stack.callback(recorder.close)
    before = checkpoints.data(start) if start else {}
    non_finite = collections.Counter(before.get("non_finite", {}))
    saver = _Saver(spec, schedule, checkpoints, before=before, non_finite=non_finite)

    def record(values: dict) -> None:
        wait.done()
        expected = schedule.expected_before(values["step"])[values["task"]]
        alarms = compiler.new_alarms()
        recorder.record(values | {"expected_steps": round(expected, 3)} | ({"alarms": alarms} if alarms else {}))

    state, lines = start_state(imp, spec, checkpoints, start, mesh=mesh)
    if rank == 0:
        needed = needed_bytes(budget, state_bytes=state_bytes(imp), fsdp=spec.fsdp)
        lines += _other_machine(before.get("cpu_kind"))
        lines += forecast_lines(forecast, num_steps=spec.num_steps - start, needed=needed)
        print("\n".join([table(budget), *lines]), flush=True)
    watchdog.beat("the state")
    loop = Loop(
        state=state,
        feed=feed,
        compiler=compiler,
        gate=gate,
        start_step=start,
        num_steps=spec.num_steps,
        learning_rates=spec.optimizer.learning_rates(),
        checkpoint_every=spec.checkpoint_every,
        hooks=Hooks(record=record, sync=recorder.sync, save=saver.save, observe=schedule.observe, beat=watchdog.beat),
        non_finite=non_finite,
    )
    try:
        done = loop.run()
    except DataError as e:
        raise DataError(_how_it_ended(e, checkpoints, non_finite)) from e
    checkpoints.wait()
    return _summary(spec, schedule, loop, compiler, quarantine, budget, imp=imp, done=done, began=began) | {
        "first_step_at": recorder.first_step_at
    }


def _what_starts(feed: Feed, compiler: StepCompiler, num_graphs: int) -> str:
    task = feed.waits_for
    batch = f"a batch of {task}, " if task else ""
    return f"the first step: {batch}{compiler.num_compiled} of {num_graphs} graphs compiled"


def state_bytes(imp: Imp) -> int:
    """Size of the whole state: parameters, moments, counts."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state_shapes(imp)))


def _mesh(spec: RunSpec, config: ModelConfig, schedule: Schedule) -> Mesh:
    """The mesh of all devices. Raises RequestError where they cannot run what the schedule holds."""
    backend = jax.default_backend()
    if config.attention == "cudnn" and (backend, config.dtype) != ("gpu", "bfloat16"):
        raise RequestError(f"model.attention: cudnn needs a gpu and bfloat16; found {backend} and {config.dtype}")
    try:
        mesh = sharding.make_mesh(expert=spec.expert_parallel)
    except ValueError as e:
        raise RequestError(f"cluster.expert_parallel: {e}") from e
    for (task, variant), structure in schedule.structures.items():
        try:
            sharding.check_batch(structure, structure.group_samples(config), mesh)
        except ValueError as e:
            raise RequestError(f"task {task}, variant {variant}: {e}") from e
    return mesh


def _use_compile_cache(folder: str | None) -> None:
    if folder is None:
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _how_it_ended(error: DataError, checkpoints: Checkpoints, non_finite: collections.Counter) -> str:
    """What ended the run, with what became of its last save and, where updates were not finite, the way back."""
    said = str(error)
    try:
        checkpoints.wait()
    except DataError as failure:
        said += f"; and {failure}"
    if max(non_finite.values(), default=0) > MOST_NON_FINITE:
        good = checkpoints.last_finite_step()
        said += f". The newest checkpoint of before that is {good or 'none'}" + (
            "; to go back to it, move those of later steps out of checkpoints/" if good else ""
        )
    return said


def _other_machine(then: str | None) -> list[str]:
    """A line where samples may be decoded to other bits than before the checkpoint."""
    if then is None or then == cpu_kind():
        return []
    return [
        f"warning: the checkpoint is from a machine of another kind, on which some media decode to other bits, so "
        f"losses may differ from those it would have had there. There: {then}. Here: {cpu_kind()}"
    ]


class _Saver:
    """What a checkpoint holds beside the state. before: what the one that the run goes on from held."""

    def __init__(self, spec: RunSpec, schedule: Schedule, checkpoints: Checkpoints, *, before: dict, non_finite):
        self._spec, self._schedule, self._checkpoints, self._non_finite = spec, schedule, checkpoints, non_finite
        # Data sets that left the recipe may come back, to where they were.
        classes = {name: list(d.classes) for name, d in spec.data_sets.items()}
        self._lasting = {
            "classes": before.get("classes", {}) | classes,
            "fingerprints": before.get("fingerprints", {}) | spec.fingerprints,
        }

    def save(self, step: int, state: dict) -> None:
        spec = self._spec
        non_finite = {task: count for task, count in self._non_finite.items() if count}
        data = self._lasting | {
            "config": spec.config,
            "position": dataclasses.asdict(self._schedule.position_at(step)),
            "samples": self._schedule.positions_before(step),
            "non_finite": non_finite,
            "cpu_kind": cpu_kind(),
            "tokenizer": base64.b64encode(spec.tokenizer or b"").decode(),
        }
        self._checkpoints.save(step, state=state, data=data, finite=not non_finite)


def _summary(spec, schedule, loop, compiler, quarantine, budget, *, imp, done: int, began: float) -> dict:
    """Plain values for summary.json: where the time went, what each task got, what was compiled and rejected."""
    counts, positions = schedule.batches_before(done), schedule.positions_before(done)
    expected = schedule.expected_before(done)
    tasks = {
        name: {
            "weight": expected[name] / max(1, sum(expected.values())),
            "expected_steps": expected[name],
            "steps": counts[name],
            "examples": positions[name],
            "data_set": task.data_set,
            "rows": spec.num_rows[task.data_set],
            "variants": _variant_counts(schedule, name, counts[name]),
        }
        for name, task in spec.tasks.items()
    }
    structures = [
        {
            "task": b.task,
            "variant": b.variant,
            "compile_s": round(compiler.compile_s.get(b.structure, 0.0), 3),
            "tokens": b.tokens,
            "vision_tokens": b.vision_tokens,
            "flops": b.flops,
            "memory_estimate_bytes": b.memory_bytes,
            "memory_bytes": compiler.memory_bytes(b.structure),
        }
        for b in budget
    ]
    train_s = time.perf_counter() - began
    return {
        "steps": done,
        "start_step": schedule.start,
        "num_steps": spec.num_steps,
        "skipped_updates": loop.skipped_updates,
        "world_size": jax.process_count(),
        "num_devices": jax.device_count(),
        "num_parameters": sum(x.size for x in jax.tree.leaves(imp.shapes())),
        "compile_count": compiler.num_compiled,
        "num_structures": len(set(schedule.structures.values())),
        "compile_alarms": len(compiler.alarms),
        "tasks": tasks,
        "structures": structures,
        "rejects": quarantine.counts,
        "time": {
            **{k: round(v, 3) for k, v in dataclasses.asdict(loop.times).items()},
            "compile_s": round(sum(compiler.compile_s.values()), 3),
            "compile_share": round(loop.times.compile_wait_s / train_s, 4),
            "train_s": round(train_s, 3),
        },
    }


def _variant_counts(schedule: Schedule, task: str, num_batches: int) -> dict[str, int]:
    plan = schedule.plans[task]
    drawn = plan.variants[:num_batches]
    return {v.name: int((drawn == i).sum()) for i, v in enumerate(plan.task.variants)}
