"""One Ray Train worker: a host with all its devices, one rank of the run."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import ray
import ray.train
from ray.train import collective

from pipeline.cluster.capacity import lacking_decode_cpu
from pipeline.cluster.failures import FailedAt, in_words
from pipeline.cluster.relay import lines_to
from pipeline.cluster.spec import Cluster
from pipeline.cluster.start import quiet_ray_data
from pipeline.cluster.step_actors import open_requests
from pipeline.cluster.task_streams import open_queues
from pipeline.data.manifest import copy_rows
from pipeline.data.task_queue import TaskQueue
from pipeline.errors import DataError, RequestError
from pipeline.store.path import run_path
from pipeline.train.checkpoint import Checkpoints
from pipeline.train.devices import check_backend
from pipeline.train.mixture.schedule import Schedule
from pipeline.train.quarantine import known_bad
from pipeline.train.reject_limit import Draws
from pipeline.train.run import train
from pipeline.train.spec import RunSpec
from pipeline.train.step_gate import NextAction, StepGate

# Errors that machines and peers may cause as well as the code: a restart may cure them.
_MAY_PASS = (OSError, MemoryError, ray.exceptions.RayError, jax.errors.JaxRuntimeError)


def train_worker(config: dict[str, Any]) -> dict:
    """The function of each worker. Returns the summary of its rank.

    config: "spec", "cluster", "coordinator" (a handle of the step coordinator's actor), "checked_step" (of the
    checkpoint whose files the driver has compared with their digests), "joins" (whether the cluster is others' too).
    """
    spec: RunSpec = config["spec"]
    cluster: Cluster = config["cluster"]
    quiet_ray_data()
    rank = ray.train.get_context().get_world_rank()
    with lines_to(config["coordinator"], rank=rank):
        check_backend(cluster.accelerator)
        copy_rows(spec.data.data_sets.values())

        def make_queues(schedule: Schedule) -> dict[str, TaskQueue]:
            context = ray.train.get_context()
            return open_queues(
                spec,
                cluster,
                schedule,
                bad=gate.known_bad,
                rank=rank,
                world_size=context.get_world_size(),
                ranks_here=context.get_local_world_size(),
            )

        gate = WorkerGate(
            config["coordinator"],
            spec,
            rank=rank,
            elastic=cluster.elastic,
            checked_step=config["checked_step"],
            shared=config["joins"],
        )
        with noting_failures(gate):
            return train(spec, make_queues, rank=rank, gate=gate, start_step=gate.start_step)


@contextlib.contextmanager
def noting_failures(gate: WorkerGate) -> Iterator[None]:
    """Notes on an error where and at which step it was raised, for ``FailureWatch``: tracebacks do not travel."""
    try:
        yield
    except Exception as e:
        frame = traceback.extract_tb(e.__traceback__)[-1]
        place, may_pass = f"{frame.filename}:{frame.lineno}", isinstance(e, _MAY_PASS)
        e.failed_at = FailedAt(gate.epoch, gate.step, place, may_pass, traceback.format_exc())
        raise


class WorkerGate(StepGate):
    """One rank's gate. The answer for a step is asked for while the step before runs.

    start_step: of the checkpoint that rank 0 has chosen; all ranks and their streams start there. known_bad: rejects of
    the run's earlier parts, which rank 0 alone reads from the journals. checked_step: of the
    checkpoint whose files the driver has compared with their digests. shared: whether the run has joined a cluster that
    others may use too. epoch: of the group of workers. step: the last that was begun.
    """

    after_compile = True

    def __init__(
        self,
        coordinator: Any,
        spec: RunSpec,
        *,
        rank: int,
        elastic: bool,
        checked_step: int | None,
        shared: bool = False,
    ):
        super().__init__()
        self._shared = shared
        self._coordinator = coordinator
        self._rank = rank
        self._elastic = elastic
        world_size = ray.train.get_context().get_world_size()
        chosen = None
        if rank == 0:
            checkpoints = spec.open_checkpoints()
            checkpoints.remove_leftovers()
            start_step = _choose_checkpoint(checkpoints, checked_step)
            begun = coordinator.begin.remote(world_size, start_step, spec.reject_counts(start_step))
            self.clock_off_s = _clock_off_s(coordinator)
            chosen = ray.get(begun), start_step, ray.put(known_bad(run_path(spec.run_dir)))
        self.epoch, self.start_step, rejects = collective.broadcast_from_rank_zero(chosen)
        self.known_bad = ray.get(rejects)
        if self.epoch > 1 and rank == 0:
            print(f"workers started again: {world_size} of them", flush=True)
        self._requests = open_requests(coordinator, self.epoch, self.start_step, rank=rank, world_size=world_size)
        self.step: int | None = None
        self._warned = False

    def ready(self, step: int, draws: Draws) -> None:
        self._requests.ready(step, draws)

    def failed(self, step: int, error: BaseException) -> None:
        self._coordinator.failed.remote(self.epoch, self._rank, step, self._reason(error))

    def end(self, error: BaseException) -> None:
        self._coordinator.end.remote(self.epoch, self._reason(error))

    def lacks(self) -> str | None:
        return lacking_decode_cpu() if self._shared else None

    def saved(self, step: int, *, compiles: bool) -> None:
        self._coordinator.saved.remote(self.epoch, self._rank, step, compiles)

    def _reason(self, error: BaseException) -> str:
        own = isinstance(error, DataError | RequestError)
        return in_words(error) if own else f"rank {self._rank}: {in_words(error)}"

    def next_action(self, step: int, *, wait: bool = True) -> NextAction | None:
        answer = self._requests.answer(step)
        if not wait and not answer.done():
            return None
        run, look, total = answer.result()
        if not run:
            return NextAction.STOP
        self.rejects_before(step)
        if total:
            self._totals[step] = total
        self.step = step
        return self._preempted() if look else NextAction.STEP

    def _preempted(self) -> NextAction:
        """The action if a machine is about to go. All ranks ask at the same step and get the same answer."""
        info = ray.train.get_preemption_info()
        if info is None or self._warned:
            return NextAction.STEP
        self._warned = True
        if self._rank == 0:
            then = "going on until it goes" if self._elastic else "stopping"
            print(f"a machine of this run is about to be taken away: saving the state and {then}", flush=True)
        return NextAction.SAVE if self._elastic else NextAction.STOP


def _clock_off_s(coordinator: Any) -> float:
    """Seconds by which this machine's clock is ahead of the coordinator's; 0 as far as an answer can tell."""
    asked = time.time()
    there = ray.get(coordinator.now.remote())
    here = time.time()
    return 0.0 if asked <= there <= here else (asked + here) / 2 - there


def _choose_checkpoint(checkpoints: Checkpoints, checked_step: int | None) -> int:
    """The step to start at. Compares the newest checkpoint with its digests, unless the driver has."""
    step = checkpoints.latest_step
    if step != checked_step:
        step, lines = checkpoints.choose(set_aside=True)
        for line in lines:
            print(f"warning: {line}", flush=True)
    return step or 0
