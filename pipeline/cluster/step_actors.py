"""The actors through which the ranks of a run agree on every step."""

from __future__ import annotations

from functools import partial
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.train.step_coordinator import StepCoordinator, callers_of, groups_of
from pipeline.train.step_requests import StepGroup, StepRequests

# Calls of an actor that may wait at once, beside those of the ranks.
_MIN_CONCURRENCY = 1000
# Calls of a rank that may wait at once: for the end of the run, for its group, and for steps.
_CALLS_A_RANK = 4


def make_coordinator(max_ranks: int) -> Any:
    """Starts the step coordinator of at most that many ranks, and returns its handle."""
    # Pinned to the driver's node: if that node is lost, so is the run.
    return _here(StepCoordinator, max_ranks).remote()


def open_requests(coordinator: Any, epoch: int, start_step: int, *, rank: int, world_size: int) -> StepRequests:
    """One rank's requests for steps. The first rank of a group starts its actor, on its own machine."""
    over = coordinator.over.remote(epoch).future()
    call = partial(coordinator.step.remote, epoch)
    for ranks in groups_of(rank, world_size):
        if rank == ranks.start:
            # Lives as long as this process, and the coordinator remembers it.
            group = start_group(ranks, call)
            coordinator.lead.remote(epoch, ranks, group)
        else:
            group = ray.get(coordinator.group.remote(epoch, ranks))
        call = group.step.remote
    return StepRequests(start_step, ask=lambda step, draws: call(rank, step, draws).future(), over=over)


def start_group(ranks: range, call: Any) -> Any:
    """Starts the actor of a group, on this machine. call: the ``step`` above it: (first rank, step, draws)."""
    return _here(_GroupActor, len(ranks)).remote(ranks, call)


class _GroupActor(StepGroup):
    """The actor of a group of ranks. call: the ``step`` above: (first rank, step, draws) → a reference."""

    def __init__(self, ranks: range, call: Any) -> None:
        super().__init__(len(callers_of(ranks)), partial(call, ranks.start))


def _here(actor: type, num_ranks: int) -> Any:
    node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    concurrency = _MIN_CONCURRENCY + _CALLS_A_RANK * num_ranks
    return ray.remote(actor).options(num_cpus=0, scheduling_strategy=node, max_concurrency=concurrency)
