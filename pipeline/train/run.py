"""One rank of a run, from its start or its last checkpoint to its end. Knows nothing of Ray: queues come in."""

from __future__ import annotations

import base64
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh

from model import sharding
from model.config import ModelConfig
from model.imp import Imp
from model.step import OptimizerConfig, compile_step, init_state, state_shapes
from pipeline.data.spec import DataSetSpec, TaskSpec, TokenSpec
from pipeline.errors import RequestError
from pipeline.host_memory import keep_freed_memory
from pipeline.train.checkpoint import Checkpoints
from pipeline.train.compiler import StepCompiler
from pipeline.train.feed import Feed, RowQueue
from pipeline.train.loop import Hooks, Loop
from pipeline.train.quarantine import Quarantine
from pipeline.train.schedule import Schedule
from pipeline.train.telemetry import Progress, StepLog


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """A whole run as plain data; ``prepare.prepare`` makes it from a recipe. Travels to workers.

    num_rows: data set → rows of its training manifest. config: the resolved recipe, stored in checkpoints.
    expert_parallel, fsdp: how parameters lie over the devices (``model.sharding``).
    """

    run_dir: str
    config: dict
    tasks: dict[str, TaskSpec]
    data_sets: dict[str, DataSetSpec]
    tokens: TokenSpec
    num_rows: dict[str, int]
    tokenizer: bytes | None
    model: ModelConfig
    optimizer: OptimizerConfig
    seed: int
    num_steps: int
    checkpoint_every: int
    log_every: int
    log_samples: bool
    keep_checkpoints: int
    progress: str
    progress_every_s: float
    compile_cache: str | None
    expert_parallel: int
    fsdp: bool

    def schedule(self) -> Schedule:
        return Schedule(
            self.tasks,
            self.data_sets,
            num_rows=self.num_rows,
            tokens=self.tokens,
            seed=self.seed,
            num_steps=self.num_steps,
        )


def use_compute_type(config: ModelConfig) -> ModelConfig:
    """dtype "auto" as this machine wants it: bfloat16 on accelerators, float32 on CPUs."""
    if config.dtype != "auto":
        return config
    return dataclasses.replace(config, dtype="float32" if jax.default_backend() == "cpu" else "bfloat16")


# start: the step to start from → the queue of each task.
QueueMaker = Callable[[int], dict[str, RowQueue]]


def train(
    spec: RunSpec,
    make_queues: QueueMaker,
    *,
    rank: int = 0,
    world_size: int = 1,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict:
    """Runs one rank to the end of the run, or until a stop is asked for. Returns the summary (see ``_summary``)."""
    began = time.perf_counter()
    run_dir, schedule, config = Path(spec.run_dir), spec.schedule(), use_compute_type(spec.model)
    mesh = _mesh(spec, config, schedule)
    checkpoints = Checkpoints(run_dir, keep_last=spec.keep_checkpoints)
    start = checkpoints.latest_step or 0
    queues = make_queues(start)
    _use_compile_cache(spec.compile_cache)
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    imp = Imp.for_structures(config, list(schedule.structures.values()))
    compiler = StepCompiler(
        lambda structure: compile_step(imp, structure, spec.optimizer, mesh=mesh, fsdp=spec.fsdp),
        schedule.in_order_of_first_use(start),
    )
    quarantine = Quarantine(
        run_dir, rank=rank, limits={name: d.max_reject_fraction for name, d in spec.data_sets.items()}
    )
    feed = Feed(
        schedule,
        queues,
        start=start,
        stop=spec.num_steps,
        quarantine=quarantine,
        put=lambda arrays: sharding.put_batch(arrays, mesh),
    )
    state = _start_state(imp, checkpoints, start, seed=spec.seed, mesh=mesh, fsdp=spec.fsdp)
    writer = _Writer(spec, schedule, checkpoints, rank=rank, start=start)
    loop = Loop(
        state=state,
        feed=feed,
        compiler=compiler,
        start_step=start,
        num_steps=spec.num_steps,
        learning_rates=spec.optimizer.learning_rates(),
        checkpoint_every=spec.checkpoint_every,
        log_every=spec.log_every,
        hooks=Hooks(record=writer.record, save=writer.save, should_stop=should_stop),
    )
    try:
        done = loop.run()
    finally:
        feed.close()
        writer.close()
        compiler.close()
    checkpoints.close()
    return _summary(spec, schedule, loop, compiler, quarantine, imp=imp, start=start, done=done, began=began) | {
        "first_step_at": writer.first_step_at
    }


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


def host_device() -> jax.Device:
    """The CPU, or where jax has been told to do without it the first accelerator."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def _use_compile_cache(folder: str | None) -> None:
    if folder is None:
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _start_state(imp: Imp, checkpoints: Checkpoints, start: int, *, seed: int, mesh: Mesh, fsdp: bool) -> dict:
    shapes = state_shapes(imp)
    shardings = sharding.state_shardings(shapes, mesh, fsdp=fsdp)
    if not start:
        # On the host first: the devices may only hold it in parts.
        with jax.default_device(host_device()):
            state = init_state(imp.init(seed))
        return sharding.put_state(state, shardings)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return checkpoints.state(abstract, step=start)


class _Writer:
    """What the loop's hooks write: metrics and samples (rank 0), checkpoints (every rank)."""

    def __init__(self, spec: RunSpec, schedule: Schedule, checkpoints: Checkpoints, *, rank: int, start: int):
        self._spec, self._schedule, self._checkpoints, self._rank = spec, schedule, checkpoints, rank
        self._began, self.first_step_at = time.perf_counter(), None
        self._metrics = self._samples = self._progress = None
        run_dir = Path(spec.run_dir)
        if spec.log_samples:
            name = "samples.jsonl" if rank == 0 else f"samples-rank-{rank}.jsonl"
            self._samples = StepLog(run_dir / name, keep_steps=start)
        if rank == 0:
            self._metrics = StepLog(run_dir / "metrics.jsonl", keep_steps=start)
            self._progress = Progress(
                mode=spec.progress, num_steps=spec.num_steps, every_s=spec.progress_every_s, start_step=start
            )

    def record(self, record: dict) -> None:
        if self.first_step_at is None:
            self.first_step_at = time.time()
        ids = record.pop("ids")
        if self._samples:
            self._samples.write({"step": record["step"], "task": record["task"], "ids": ids})
        if self._metrics:
            self._metrics.write(record | {"wall_s": round(time.perf_counter() - self._began, 3)})
            self._progress.update(record)

    def save(self, step: int, state: dict) -> None:
        for log in (self._metrics, self._samples):
            if log:
                log.sync()
        spec = self._spec
        data = {
            "config": spec.config,
            "batches": self._schedule.batches_before(step),
            "positions": self._schedule.positions_before(step),
            "classes": {name: list(d.classes) for name, d in spec.data_sets.items()},
            "num_rows": spec.num_rows,
            "tokenizer": base64.b64encode(spec.tokenizer or b"").decode(),
        }
        self._checkpoints.save(step, state=state, data=data)

    def close(self) -> None:
        for part in (self._metrics, self._samples, self._progress):
            if part:
                part.close()


def _summary(spec, schedule, loop, compiler, quarantine, *, imp, start: int, done: int, began: float) -> dict:
    """Plain values for summary.json: where the time went, what each task got, what was compiled and rejected."""
    counts, positions = schedule.batches_before(done), schedule.positions_before(done)
    weights = dict(zip(schedule.sampler.names, schedule.sampler.probabilities.tolist(), strict=True))
    tasks = {
        name: {
            "weight": weights[name],
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
            "task": task,
            "variant": variant,
            "compile_s": round(compiler.compile_s.get(structure, 0.0), 3),
            "vision_tokens": structure.global_batch_size
            * sum(i.num_tokens for i in structure.inputs if i.modality == "vision"),
            "tokens": structure.global_batch_size * sum(i.num_tokens for i in structure.inputs),
        }
        for (task, variant), structure in schedule.structures.items()
    ]
    return {
        "steps": done,
        "start_step": start,
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
            "train_s": round(time.perf_counter() - began, 3),
        },
    }


def _variant_counts(schedule: Schedule, task: str, num_batches: int) -> dict[str, int]:
    plan = schedule.plans[task]
    drawn = plan.variants[:num_batches]
    return {v.name: int((drawn == i).sum()) for i, v in enumerate(plan.task.variants)}
