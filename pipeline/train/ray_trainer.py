"""The only file of training that knows Ray: one run under JaxTrainer, in the driver's process or in N workers."""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import ray
import ray.train
from ray.train import DataConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.v2.jax import JaxTrainer
from ray.train.v2.jax.config import JaxConfig

from pipeline.data.media.process import DecodeLimits
from pipeline.data.streams import (
    DecodeOptions,
    StreamSpec,
    TaskQueue,
    build_stream,
    checked_rows,
    cluster_cpus,
    decode_shares,
    iterate,
    quiet_ray_data,
)
from pipeline.errors import DataError, RequestError
from pipeline.train.checkpoint import Checkpoints
from pipeline.train.quarantine import known_bad
from pipeline.train.run import RunSpec, train

_QUEUE_ROWS = 2


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where a run runs: ``cluster.*`` of the recipe as plain data."""

    num_workers: int = 0
    accelerator: str = "cpu"
    accelerators_per_worker: int = 1
    cpus_per_worker: float = 1.0
    topology: str | None = None
    accelerator_type: str | None = None
    address: str | None = None
    decode: DecodeOptions = dataclasses.field(default_factory=DecodeOptions)
    cache_bytes: int = 0
    limits: DecodeLimits = dataclasses.field(default_factory=DecodeLimits)


def start_ray(cluster: Cluster, *, driver_cpus: int = 1) -> None:
    """Joins the cluster that is there (a submitted job, ``cluster.address``), or starts one on this machine.

    driver_cpus: CPUs of this machine that the driver's own work needs.
    """
    if ray.is_initialized():
        return
    quiet_ray_data()
    # Nothing of a run leaves the machine without being asked for.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if cluster.address or os.environ.get("RAY_ADDRESS"):
        ray.init(address=cluster.address, logging_level="error")
        return
    # Ray starts its processes by fork and exec at once, which is safe beside JAX's threads.
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")
    # Ray's default of 15 gives decode a twentieth of a core while the trainer beside it compiles; 5 gives a third.
    os.environ.setdefault("RAY_worker_niceness", "5")
    # Decode must find CPUs beside the trainers, so theirs are counted on top.
    cpus = max(1, (os.cpu_count() or 1) - driver_cpus) + round(cluster.num_workers * cluster.cpus_per_worker)
    # "local": a head that someone started on this machine is joined only where ``cluster.address`` says so.
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        object_store_memory=_object_store_bytes(),
        logging_level="error",
    )


def _object_store_bytes() -> int:
    """A tenth of the memory, between 0.5 and 8 GB: streams are bounded, so more would only be reserved."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min(max(total // 10, 512 << 20), 8 << 30))


def fit(spec: RunSpec, cluster: Cluster, *, should_stop: Callable[[], bool]) -> dict:
    """Trains and returns rank 0's summary."""
    if cluster.num_workers == 0:
        trainer = JaxTrainer(
            train_loop_per_worker=lambda: _train_locally(spec, cluster, should_stop),
            scaling_config=ScalingConfig(num_workers=0),
            run_config=_run_config(spec),
        )
        return trainer.fit().return_value
    trainer = JaxTrainer(
        train_loop_per_worker=_train_worker,
        train_loop_config={"spec": spec},
        scaling_config=_scaling(cluster),
        jax_config=JaxConfig(use_tpu=cluster.accelerator != "gpu", use_gpu=cluster.accelerator == "gpu"),
        dataset_config=StreamConfig(spec, cluster),
        datasets=dict.fromkeys(_running_tasks(spec), _placeholder),
        run_config=_run_config(spec, cluster),
    )
    try:
        return trainer.fit().return_value
    except TrainingFailedError as e:
        # What a worker said of data or request is for the user; the traceback around it is not.
        said = next(filter(None, map(_own_error, getattr(e, "worker_failures", {}).values())), None)
        if said is None:
            raise
        raise said from None


def _own_error(failure: BaseException | None) -> DataError | RequestError | None:
    """The project's own error inside what Ray wrapped around it."""
    while failure is not None and not isinstance(failure, DataError | RequestError):
        failure = getattr(failure, "_base_exc", None) or getattr(failure, "cause", None) or failure.__cause__
    return failure


def check_world(spec: RunSpec, num_workers: int) -> None:
    """Raises RequestError where the workers cannot share a batch in equal parts."""
    for task in spec.tasks.values():
        for variant in task.variants:
            if num_workers and variant.global_batch_size % num_workers:
                raise RequestError(
                    f"cluster.num_workers = {num_workers} does not divide the batch of {variant.global_batch_size} of "
                    f"task {task.name} ({variant.name}); change one of them"
                )


def _running_tasks(spec: RunSpec) -> list[str]:
    return sorted({task for task, _ in spec.schedule().structures})


def _placeholder():
    """Ray Train wants a dataset a name up front; ``StreamConfig.configure`` puts the real stream in its place."""
    return ray.data.range(1)


def _scaling(cluster: Cluster) -> ScalingConfig:
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.accelerator != "cpu":
        resources[cluster.accelerator.upper()] = cluster.accelerators_per_worker
    tpu = {"topology": cluster.topology, "accelerator_type": cluster.accelerator_type}
    return ScalingConfig(
        num_workers=cluster.num_workers,
        use_gpu=cluster.accelerator == "gpu",
        resources_per_worker=resources,
        **({"use_tpu": True, **tpu} if cluster.accelerator == "tpu" else {}),
    )


def _run_config(spec: RunSpec, cluster: Cluster | None = None) -> RunConfig:
    # Our own checkpoints and metrics are in the run directory; Ray keeps only its bookkeeping there.
    run_dir = Path(spec.run_dir)
    env = {"JAX_PLATFORMS": "cpu"} if cluster and cluster.accelerator == "cpu" else {}
    # jax.distributed runs on CPUs only when JaxConfig is told "TPU" and the platform is pinned to the CPU.
    return RunConfig(name="ray", storage_path=str(run_dir), worker_runtime_env={"env_vars": env})


def stream_spec(spec: RunSpec, cluster: Cluster, *, task: str, start_step: int) -> StreamSpec:
    """The stream of one task from a step on, to the end of the run."""
    schedule = spec.schedule()
    start, stop = (schedule.batches_before(step)[task] for step in (start_step, spec.num_steps))
    data_set = spec.data_sets[spec.tasks[task].data_set]
    return StreamSpec(
        task=spec.tasks[task],
        data_set=data_set,
        tokens=spec.tokens,
        tokenizer=spec.tokenizer,
        seed=spec.seed,
        num_rows=spec.num_rows[data_set.name],
        start=start,
        stop=stop,
        share=(stop - start) / max(1, spec.num_steps - start_step),
        known_bad=known_bad(Path(spec.run_dir)).get(task, {}),
        cache_bytes=cluster.cache_bytes,
        limits=cluster.limits,
    )


def build_streams(spec: RunSpec, cluster: Cluster, *, tasks: list[str], start_step: int, world_size: int) -> dict:
    """Task → (the stream of its batches from a step on, the first of them). A task that is done has none."""
    wanted = [stream_spec(spec, cluster, task=name, start_step=start_step) for name in tasks]
    wanted = [w for w in wanted if w.start < w.stop]
    cpus = cluster_cpus() - cluster.num_workers * cluster.cpus_per_worker
    shares = decode_shares(wanted, cpus=cpus, world_size=world_size)
    return {
        w.task.name: (
            build_stream(w, world_size=world_size, options=cluster.decode, share=shares[w.task.name]),
            w.start,
        )
        for w in wanted
    }


class StreamConfig(DataConfig):
    """Builds each task's stream where the world size and the checkpoint are known: at each start of the workers."""

    def __init__(self, spec: RunSpec, cluster: Cluster):
        super().__init__()
        self._spec, self._cluster = spec, cluster

    def configure(self, datasets, world_size, worker_handles=None, worker_node_ids=None, **kwargs):
        quiet_ray_data()
        checkpoints = Checkpoints(Path(self._spec.run_dir))
        start = checkpoints.latest_step or 0
        checkpoints.close()
        out = [{} for _ in range(world_size)]
        streams = build_streams(
            self._spec, self._cluster, tasks=list(datasets), start_step=start, world_size=world_size
        )
        for name, (stream, _) in streams.items():
            splits = stream.streaming_split(world_size, equal=True, locality_hints=worker_node_ids)
            for rank, split in enumerate(splits):
                out[rank][name] = split
        return out


def _train_locally(spec: RunSpec, cluster: Cluster, should_stop: Callable[[], bool]) -> dict:
    def make_queues(start: int) -> dict[str, TaskQueue]:
        # Tracing a step holds the interpreter lock for seconds; the streams' threads need it for microseconds, often.
        sys.setswitchinterval(0.001)
        streams = build_streams(spec, cluster, tasks=_running_tasks(spec), start_step=start, world_size=1)
        return {name: open_queue(s, task=name, start=first, rank=0) for name, (s, first) in streams.items()}

    return train(spec, make_queues, should_stop=should_stop)


def open_queue(stream, *, task: str, start: int, rank: int) -> TaskQueue:
    """The checked rows of a stream, pulled ahead by a thread."""
    rows = checked_rows(iterate(stream), task=task, start=start, rank=rank)
    return TaskQueue(rows, task=task, depth=_QUEUE_ROWS)


def _train_worker(config: dict) -> dict:
    """One Ray Train worker: a host with all its devices."""
    spec: RunSpec = config["spec"]
    quiet_ray_data()
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()

    def make_queues(start: int) -> dict[str, TaskQueue]:
        schedule = spec.schedule()
        begins, ends = schedule.batches_before(start), schedule.batches_before(spec.num_steps)
        # get_dataset_shard is a barrier over the ranks: the same order everywhere.
        names = [name for name in _running_tasks(spec) if begins[name] < ends[name]]
        shards = {name: ray.train.get_dataset_shard(name) for name in names}
        return {name: open_queue(s, task=name, start=begins[name], rank=rank) for name, s in shards.items()}

    return train(spec, make_queues, rank=rank, world_size=world_size)
