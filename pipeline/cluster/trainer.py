"""A run under Ray Train: in the driver's process, or in workers."""

from __future__ import annotations

import functools
import sys
from typing import Any

import ray
from ray.train import TrainingFailedError
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.jax import JaxTrainer

from pipeline.cluster import ray_private, ray_train
from pipeline.cluster.capacity import await_room, lacking_decode_cpu
from pipeline.cluster.failures import FailureWatch, raise_failure, raise_lost_ray
from pipeline.cluster.head_watch import HeadWatch
from pipeline.cluster.relay import Relay
from pipeline.cluster.scaling import scaling_config
from pipeline.cluster.spec import Cluster
from pipeline.cluster.step_actors import make_coordinator
from pipeline.cluster.task_streams import open_queues
from pipeline.cluster.worker import train_worker
from pipeline.commands import typed_command
from pipeline.data.task_queue import TaskQueue
from pipeline.errors import DataError, RequestError
from pipeline.files import cache_dir
from pipeline.stopping import Stop
from pipeline.store.ownership import holder, writing_for
from pipeline.store.path import local_folder, run_path
from pipeline.train.mixture.schedule import Schedule
from pipeline.train.quarantine import known_bad
from pipeline.train.run import train
from pipeline.train.spec import RunSpec
from pipeline.train.step_gate import NextAction, StepGate

# Seconds for an answer of the step coordinator.
_ANSWER_S = 10.0


def check_world(spec: RunSpec, cluster: Cluster) -> None:
    """Raises RequestError if a number of workers that the run may have cannot share a batch in equal parts."""
    asked = f"{cluster.num_workers[0]} to {cluster.num_workers[1]}" if cluster.elastic else cluster.num_workers
    variants = [(task.name, variant) for task in spec.data.tasks.values() for variant in task.variants]
    for num_workers in filter(None, cluster.sizes):
        for task, variant in variants:
            if variant.global_batch_size % num_workers:
                raise RequestError(
                    f"cluster.num_workers = {asked}: {num_workers} workers cannot share the batch of "
                    f"{variant.global_batch_size} of task {task} ({variant.name}) in equal parts; change one of them"
                )


def fit(spec: RunSpec, cluster: Cluster, *, stop: Stop) -> dict:
    """Trains and returns rank 0's summary. stop: deferred once a step has run and its state can be saved."""
    try:
        return fit_workers(spec, cluster, stop) if cluster.num_workers else fit_here(spec, cluster, stop)
    except ray.exceptions.RayTaskError:
        # A bug in decoding, with its place.
        raise
    except ray.exceptions.RayError as e:
        raise_lost_ray(e, spec)


# --- in the driver's process ---


def fit_here(spec: RunSpec, cluster: Cluster, stop: Stop) -> dict:
    """Trains in this process; only decoding runs in others."""
    trainer = JaxTrainer(
        train_loop_per_worker=lambda: _train_here(spec, cluster, stop),
        scaling_config=ScalingConfig(num_workers=0),
        run_config=RunConfig(name="ray", storage_path=_ray_folder(spec)),
    )
    return trainer.fit().return_value


def _train_here(spec: RunSpec, cluster: Cluster, stop: Stop) -> dict:
    def make_queues(schedule: Schedule) -> dict[str, TaskQueue]:
        # Tracing a step holds the GIL for seconds; the streams' threads need it for microseconds, often.
        sys.setswitchinterval(0.001)
        return open_queues(spec, cluster, schedule, bad=known_bad(run_path(spec.run_dir)))

    spec.open_checkpoints().remove_leftovers()
    gate = _LocalGate(stop, cluster)
    with HeadWatch(stop, spec, joined=cluster.joins is not None, last=lambda: gate.last):
        return train(spec, make_queues, gate=gate)


class _LocalGate(StepGate):
    """Defers a stop from the first step on: then a state can be saved.

    last: the number of updates after which the run stops, once it does.
    """

    def __init__(self, stop: Stop, cluster: Cluster):
        super().__init__(stop.is_set)
        self._stop = stop
        self._cluster = cluster
        self._first: int | None = None
        self._step: int | None = None
        self.last: int | None = None

    def next_action(self, step: int, *, wait: bool = True) -> NextAction | None:
        self._first = step if self._first is None else self._first
        if step > self._first:
            self._stop.defer()
        self._step = step
        action = super().next_action(step, wait=wait)
        self.last = step if action is NextAction.STOP else None
        return action

    def leaves(self) -> bool:
        leaves = super().leaves()
        # The step that was granted may still be waiting for its batch.
        self.last = self._step if leaves else self.last
        return leaves

    def lacks(self) -> str | None:
        return lacking_decode_cpu() if self._cluster.joins else None

    def saved(self, step: int, *, compiles: bool) -> None:
        if compiles and self._stop.is_set():
            self._stop.at_once(f"stopped after step {step}, state saved; go on with: {typed_command()}")


# --- in workers ---


def fit_workers(spec: RunSpec, cluster: Cluster, stop: Stop) -> dict:
    """Trains in ``cluster.num_workers`` workers.

    Workers that are lost start again from the newest checkpoint, at most ``cluster.max_failures`` times; the project's
    own errors, of data or request, end the run at once.
    """
    if cluster.joins:
        ray_private.keep_shared_actors_here()
    await_room(cluster)
    coordinator = make_coordinator(cluster.sizes[-1])
    trainer = _workers_trainer(spec, cluster, coordinator)
    relay = Relay(coordinator, stop, spec=spec, cluster=cluster)
    last = functools.partial(_last_update, coordinator)
    with relay, HeadWatch(stop, spec, joined=cluster.joins is not None, last=last):
        try:
            summary = trainer.fit().return_value
        except TrainingFailedError as e:
            raise_failure(e, spec, cluster)
    if reason := ray.get(coordinator.why.remote()):
        raise DataError(f"{reason} (stopped after step {summary['steps']}, its state saved)")
    return summary


def _last_update(coordinator: Any) -> int | None:
    return ray.get(coordinator.last.remote(), timeout=_ANSWER_S)


def _workers_trainer(spec: RunSpec, cluster: Cluster, coordinator: Any) -> JaxTrainer:
    config = {
        "spec": spec,
        "coordinator": coordinator,
        "cluster": cluster,
        "joins": bool(cluster.joins),
        "checked_step": spec.open_checkpoints().latest_step,
    }
    owner = holder(run_path(spec.run_dir))
    trainer = JaxTrainer(
        # Ray Train's own config would be opened by its controller too, which then loads JAX for a second.
        train_loop_per_worker=lambda: _train_for(owner, config),
        scaling_config=scaling_config(cluster),
        # jax.distributed runs on CPUs only if JaxConfig is told "TPU" and the platform is pinned to the CPU.
        jax_config=ray_train.PlainJaxConfig(
            use_tpu=cluster.accelerator != "gpu",
            use_gpu=cluster.accelerator == "gpu",
            platform="cpu" if cluster.accelerator == "cpu" else None,
        ),
        run_config=_run_config(spec, cluster, coordinator),
    )
    shared = cluster.joins is not None
    ray_train.leave_signals_alone(trainer)
    ray_train.drop_callbacks(trainer, shared=shared)
    ray_train.share_processes(trainer, shared=shared)
    return trainer


def _train_for(owner: str | None, config: dict[str, Any]) -> dict:
    """The work of one worker. owner: of the lock of the run directory."""
    with writing_for(owner, run_path(config["spec"].run_dir)):
        return train_worker(config)


def _ray_folder(spec: RunSpec) -> str:
    """The folder for Ray's bookkeeping: a run has checkpoints and logs of its own, so no other machine reads it."""
    return str(local_folder(run_path(spec.run_dir), cache_dir()))


def _run_config(spec: RunSpec, cluster: Cluster, coordinator: Any) -> RunConfig:
    return RunConfig(
        name="ray",
        storage_path=_ray_folder(spec),
        failure_config=FailureConfig(max_failures=cluster.max_failures),
        callbacks=[FailureWatch(coordinator, spec.run_dir)],
        # Silences Ray Train; the failure that ends the run is raised here.
        logging_config=LoggingConfig(log_level="CRITICAL"),
    )
