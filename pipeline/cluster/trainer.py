"""The file of training that knows Ray Train: one run under JaxTrainer, in the driver's process or in N workers."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import ray
import ray.train
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, UserCallback, collective
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.config import LoggingConfig
from ray.train.v2.jax import JaxTrainer
from ray.train.v2.jax.config import JaxConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.cluster.relay import Relay, lines_to
from pipeline.cluster.start import Cluster, await_room
from pipeline.cluster.streams import (
    StreamSpec,
    TaskQueue,
    build_stream,
    checked_rows,
    cluster_cpus,
    decode_shares,
    end_streams,
    iterate,
    quiet_ray_data,
)
from pipeline.credentials import redacted
from pipeline.errors import DataError, RequestError, one_line
from pipeline.stopping import Stop
from pipeline.train.checkpoint import Checkpoints
from pipeline.train.devices import check_backend
from pipeline.train.mixture.schedule import Schedule
from pipeline.train.quarantine import known_bad
from pipeline.train.run import train
from pipeline.train.spec import RunSpec
from pipeline.train.step_gate import NextAction, StepCoordinator, StepGate

_QUEUE_ROWS = 2


def fit(spec: RunSpec, cluster: Cluster, *, stop: Stop) -> dict:
    """Trains and returns rank 0's summary.

    Workers that are lost start again from the newest checkpoint, at most ``cluster.max_failures`` times; what the
    project itself says of data or request ends the run at once. stop: deferred once there is a step to save.
    """
    if cluster.num_workers == 0:
        trainer = JaxTrainer(
            train_loop_per_worker=lambda: _train_locally(spec, cluster, stop),
            scaling_config=ScalingConfig(num_workers=0),
            run_config=_run_config(spec),
        )
        return trainer.fit().return_value
    await_room(cluster)
    # On the driver's machine, which no preemption takes while the run goes on.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # Each worker asks for two steps ahead, and waits.
    options = {"num_cpus": 0, "scheduling_strategy": here, "max_concurrency": max(1000, 4 * cluster.sizes[-1])}
    keeper = ray.remote(StepCoordinator).options(**options).remote()
    trainer = _WorkersTrainer(
        train_loop_per_worker=_train_worker,
        train_loop_config={
            "spec": spec,
            "keeper": keeper,
            "cluster": cluster,
            "checked_step": spec.open_checkpoints().latest_step,
        },
        scaling_config=_scaling(cluster),
        jax_config=JaxConfig(use_tpu=cluster.accelerator != "gpu", use_gpu=cluster.accelerator == "gpu"),
        dataset_config=StreamConfig(spec, cluster, keeper),
        datasets=dict.fromkeys(_running_tasks(spec), _placeholder),
        run_config=_run_config(spec, cluster, keeper),
    )
    trainer.joined = cluster.joins is not None
    with Relay(keeper, stop, spec=spec, cluster=cluster):
        try:
            summary = trainer.fit().return_value
        except TrainingFailedError as e:
            # What a worker said of data or request is for the user; the traceback around it is not.
            found = [getattr(e, "controller_failure", None), *getattr(e, "worker_failures", {}).values()]
            said = next(filter(None, map(_own_error, found)), None)
            raise said or _failed(spec, cluster, e) from e
    if reason := ray.get(keeper.why.remote()):
        raise DataError(f"{reason} (stopped after step {summary['steps']}, its state saved)")
    return summary


class _WorkersTrainer(JaxTrainer):
    """joined: the cluster was there before."""

    joined = False

    def _register_sigint_handler(self, controller) -> None:
        """Nothing: Ray's own would drop the workers at Ctrl-C; ours asks them to save and stop."""

    def _create_default_callbacks(self):
        """Ray's cleaner of placement groups complains where there is no dashboard. A cluster of this run's own has
        none, and needs no cleaner: it goes with the run."""
        found = super()._create_default_callbacks()
        return found if self.joined else [c for c in found if not isinstance(c, PlacementGroupCleanerCallback)]


def _failed(spec: RunSpec, cluster: Cluster, error: TrainingFailedError) -> DataError:
    """Workers that failed too often, in one line; all that Ray has to say goes to a file."""
    path = Path(spec.run_dir) / "failure.txt"
    with contextlib.suppress(OSError):
        path.write_text(redacted("".join(traceback.format_exception(error))), encoding="utf-8")
    newest = spec.open_checkpoints().latest_step or "none"
    return DataError(
        f"the workers failed, the last of more than cluster.max_failures = {cluster.max_failures} times; all of it: "
        f"{path}. The newest whole checkpoint is {newest}; run the same command again to go on from it"
    )


class _OwnErrorsEndTheRun(UserCallback):
    """Ray would start the workers again: bad data or a wrong request would only fail anew. Of other failures it says in
    one line what a log of many pages holds."""

    def __init__(self, keeper):
        self._keeper = keeper

    def after_exception(self, run_context, worker_exceptions) -> None:
        for error in filter(None, map(_own_error, worker_exceptions.values())):
            raise error
        said = {rank: one_line(error) for rank, error in worker_exceptions.items()}
        # One that died itself says more than those whose peer went away.
        rank, text = next(((r, t) for r, t in said.items() if "died" in t), next(iter(said.items())))
        ray.get(self._keeper.lost.remote(f"workers {sorted(said)} failed; rank {rank}: {text[:300]}\n"))


def _own_error(failure: BaseException | None) -> DataError | RequestError | None:
    """The project's own error inside what Ray wrapped around it."""
    while failure is not None and not isinstance(failure, DataError | RequestError):
        failure = getattr(failure, "_base_exc", None) or getattr(failure, "cause", None) or failure.__cause__
    return failure


def check_world(spec: RunSpec, cluster: Cluster) -> None:
    """Raises RequestError where a number of workers that the run may have cannot share a batch in equal parts."""
    for num_workers in filter(None, cluster.sizes):
        for task in spec.data.tasks.values():
            for variant in task.variants:
                if variant.global_batch_size % num_workers:
                    asked = f"{cluster.num_workers[0]} to {cluster.num_workers[1]}" if cluster.elastic else num_workers
                    raise RequestError(
                        f"cluster.num_workers = {asked}: {num_workers} workers cannot share the batch of "
                        f"{variant.global_batch_size} of task {task.name} ({variant.name}) in equal parts; change one "
                        "of them"
                    )


def _running_tasks(spec: RunSpec) -> list[str]:
    return sorted(spec.mixture.sampler.runs(spec.data.tasks))


def _placeholder():
    """Ray Train wants a dataset a name up front; ``StreamConfig.configure`` puts the real stream in its place."""
    return ray.data.range(1)


def _scaling(cluster: Cluster) -> ScalingConfig:
    tpu = {"topology": cluster.topology, "accelerator_type": cluster.accelerator_type}
    return ScalingConfig(
        num_workers=cluster.num_workers,
        use_gpu=cluster.accelerator == "gpu",
        resources_per_worker=cluster.worker_resources,
        **({"use_tpu": True, **tpu} if cluster.accelerator == "tpu" else {}),
    )


def _run_config(spec: RunSpec, cluster: Cluster | None = None, keeper=None) -> RunConfig:
    # Our own checkpoints and metrics are in the run directory; Ray keeps only its bookkeeping there.
    run_dir = Path(spec.run_dir)
    if cluster is None:
        return RunConfig(name="ray", storage_path=str(run_dir))
    # jax.distributed runs on CPUs only when JaxConfig is told "TPU" and the platform is pinned to the CPU.
    env = {"JAX_PLATFORMS": "cpu"} if cluster.accelerator == "cpu" else {}
    return RunConfig(
        name="ray",
        storage_path=str(run_dir),
        worker_runtime_env={"env_vars": env},
        failure_config=FailureConfig(max_failures=cluster.max_failures),
        callbacks=[_OwnErrorsEndTheRun(keeper)],
        # Ray Train's own words; what fails in the end is raised here.
        logging_config=LoggingConfig(log_level="CRITICAL"),
    )


def stream_spec(spec: RunSpec, cluster: Cluster, *, task: str, schedule: Schedule, bad: dict) -> StreamSpec:
    """The stream of one task from the schedule's start to the end of the run. bad: of ``quarantine.known_bad``."""
    data = spec.data
    data_set = data.data_sets[data.tasks[task].data_set]
    return StreamSpec(
        task=data.tasks[task],
        data_set=data_set,
        tokens=data.tokens,
        tokenizer=data.tokenizer,
        seed=spec.mixture.seed,
        fingerprint=data.fingerprints[data_set.name],
        start=schedule.batches_before(schedule.start)[task],
        stop=schedule.batches_at_most(task),
        share=schedule.share(task),
        known_bad=bad.get(task, {}),
        cache_bytes=cluster.cache_bytes,
        limits=cluster.limits,
    )


def build_streams(spec: RunSpec, cluster: Cluster, *, schedule: Schedule, world_size: int) -> dict:
    """Task → (the stream of its batches from the schedule's start on, the first of them). A task that is done has
    none."""
    bad = known_bad(Path(spec.run_dir))
    wanted = [stream_spec(spec, cluster, task=name, schedule=schedule, bad=bad) for name in _running_tasks(spec)]
    wanted = [w for w in wanted if w.start < w.stop]
    cpus = cluster_cpus() - cluster.trainer_cpus(world_size if cluster.num_workers else 0)
    shares = decode_shares(wanted, cpus=cpus, world_size=world_size)
    return {
        w.task.name: (
            build_stream(w, world_size=world_size, options=cluster.decode, share=shares[w.task.name]),
            w.start,
        )
        for w in wanted
    }


class StreamConfig(DataConfig):
    """Builds the tasks' streams where the world size and the checkpoint are known: at each start of the workers.

    Ray asks for one data set after another, and anew for each group of workers, of a copy of its own.
    """

    def __init__(self, spec: RunSpec, cluster: Cluster, keeper):
        super().__init__()
        self._spec, self._cluster, self._keeper, self._streams = spec, cluster, keeper, None

    def configure(self, datasets, world_size, worker_handles=None, worker_node_ids=None, **kwargs):
        if self._streams is None:
            quiet_ray_data()
            step = ray.get(self._keeper.starts_at.remote())
            schedule = self._spec.schedule(self._spec.position(step))
            self._streams = build_streams(self._spec, self._cluster, schedule=schedule, world_size=world_size)
        out = [{} for _ in range(world_size)]
        for name in datasets:
            stream, _ = self._streams[name]
            splits = stream.streaming_split(world_size, equal=True, locality_hints=worker_node_ids)
            for rank, split in enumerate(splits):
                out[rank][name] = split
        return out


def _train_locally(spec: RunSpec, cluster: Cluster, stop: Stop) -> dict:
    def make_queues(schedule: Schedule) -> dict[str, TaskQueue]:
        # Tracing a step holds the interpreter lock for seconds; the streams' threads need it for microseconds, often.
        sys.setswitchinterval(0.001)
        streams = build_streams(spec, cluster, schedule=schedule, world_size=1)
        return {
            name: open_queue(s, task=name, start=first, rank=0, end=end_streams) for name, (s, first) in streams.items()
        }

    spec.open_checkpoints().remove_leftovers()
    return train(spec, make_queues, gate=_LocalGate(stop))


def open_queue(stream, *, task: str, start: int, rank: int, end: Callable[[], None] = lambda: None) -> TaskQueue:
    """The checked rows of a stream, pulled ahead by a thread. end: wakes a thread that waits for the next of them."""
    rows = checked_rows(iterate(stream), task=task, start=start, rank=rank)
    return TaskQueue(rows, task=task, depth=_QUEUE_ROWS, end=end)


class _LocalGate(StepGate):
    """From the first step on there is something to save: then a stop is deferred."""

    def __init__(self, stop: Stop):
        super().__init__(stop.is_set)
        self._stop, self._first = stop, None

    def next_action(self, step: int, *, wait: bool = True) -> NextAction | None:
        self._first = step if self._first is None else self._first
        if step > self._first:
            self._stop.defer()
        return super().next_action(step, wait=wait)


class _WorkerGate(StepGate):
    """One rank's gate. The answer for a step is asked for while the step before runs.

    start_step: of the checkpoint that rank 0 has chosen; all ranks and their streams start there. checked_step: of the
    one whose files the driver has found to be what was written.
    """

    def __init__(self, keeper, spec: RunSpec, *, rank: int, elastic: bool, checked_step: int | None):
        super().__init__()
        self._keeper, self._rank, self._elastic = keeper, rank, elastic
        world_size = ray.train.get_context().get_world_size()
        chosen = None
        if rank == 0:
            checkpoints = spec.open_checkpoints()
            checkpoints.remove_leftovers()
            start_step = self._chosen(checkpoints, checked_step)
            chosen = ray.get(keeper.begin.remote(world_size, start_step)), start_step
        self._epoch, self.start_step = collective.broadcast_from_rank_zero(chosen)
        if self._epoch > 1 and rank == 0:
            print(f"workers started again: {world_size} of them", flush=True)
        self._asked: dict[int, ray.ObjectRef] = {}
        self._warned = False

    @staticmethod
    def _chosen(checkpoints: Checkpoints, checked_step: int | None) -> int:
        step = checkpoints.latest_step
        if step != checked_step:
            step, lines = checkpoints.choose(set_aside=True)
            for line in lines:
                print(f"warning: {line}", flush=True)
        return step or 0

    def ready(self, step: int) -> None:
        self._keeper.ready.remote(self._epoch, self._rank, step)

    def failed(self, step: int, error: BaseException) -> None:
        self._keeper.failed.remote(self._epoch, self._rank, step, self._said(error))

    def end(self, error: BaseException) -> None:
        self._keeper.end.remote(self._epoch, self._said(error))

    def _said(self, error: BaseException) -> str:
        return str(error) if isinstance(error, DataError | RequestError) else f"rank {self._rank}: {one_line(error)}"

    def next_action(self, step: int, *, wait: bool = True) -> NextAction | None:
        answer = self._ask(step)
        self._ask(step + 1)
        if not wait and not ray.wait([answer], timeout=0)[0]:
            return None
        run, look = ray.get(answer)
        del self._asked[step]
        if not run:
            return NextAction.STOP
        return self._preempted() if look else NextAction.STEP

    def _ask(self, step: int) -> ray.ObjectRef:
        if step not in self._asked:
            self._asked[step] = self._keeper.grant.remote(self._epoch, step)
        return self._asked[step]

    def _preempted(self) -> NextAction:
        """All ranks look at the same step and see the same: Ray Train agrees on it."""
        info = ray.train.get_preemption_info()
        if info is None or self._warned:
            return NextAction.STEP
        self._warned = True
        if self._rank == 0:
            then = "going on until it goes" if self._elastic else "stopping"
            print(f"a machine of this run is about to be taken away: saving the state and {then}", flush=True)
        return NextAction.SAVE if self._elastic else NextAction.STOP


def _train_worker(config: dict) -> dict:
    """One Ray Train worker: a host with all its devices."""
    spec: RunSpec = config["spec"]
    quiet_ray_data()
    rank = ray.train.get_context().get_world_rank()
    with lines_to(config["keeper"], rank=rank):
        return _train_rank(spec, config, rank)


def _train_rank(spec: RunSpec, config: dict, rank: int) -> dict:
    check_backend(config["cluster"].accelerator)

    def make_queues(schedule: Schedule) -> dict[str, TaskQueue]:
        begins = schedule.batches_before(schedule.start)
        # get_dataset_shard is a barrier over the ranks: the same order everywhere.
        names = [name for name in _running_tasks(spec) if begins[name] < schedule.batches_at_most(name)]
        shards = {name: ray.train.get_dataset_shard(name) for name in names}
        return {name: open_queue(s, task=name, start=begins[name], rank=rank) for name, s in shards.items()}

    gate = _WorkerGate(
        config["keeper"], spec, rank=rank, elastic=config["cluster"].elastic, checked_step=config["checked_step"]
    )
    return train(spec, make_queues, rank=rank, gate=gate, start_step=gate.start_step)
