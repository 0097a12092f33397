"""An input of Ray Data whose blocks are made while they are used; private parts of Ray Data 2.60, like ``ray_private``.

Ray's own inputs are lists: every block is planned, and kept, before the first one is read.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import pyarrow as pa
import ray
from ray.data import DataContext, Dataset
from ray.data._internal.actor_autoscaler import AutoscalingActorPool
from ray.data._internal.cluster_autoscaler import DefaultClusterAutoscalerV2, create_cluster_autoscaler
from ray.data._internal.execution import streaming_executor
from ray.data._internal.execution.interfaces import BlockEntry, RefBundle
from ray.data._internal.execution.operators.input_data_buffer import InputDataBuffer
from ray.data._internal.logical.interfaces import LogicalOperator, LogicalPlan, SourceOperator
from ray.data._internal.planner.planner import Planner
from ray.data._internal.stats import DatasetStats
from ray.data.block import BlockMetadata


class Source(Protocol):
    """What a stream decodes. Called by the thread that schedules the stream.

    ended: whether the stream is to end at once.
    """

    ended: bool

    def take(self, unfinished: int) -> pa.Table | None:
        """The next block's description; None if it may not start yet. unfinished: blocks taken and not yet decoded."""

    def keep(self, ref: ray.ObjectRef) -> None:
        """Keeps the object of the description taken last until its block has arrived.

        Without it Ray cannot decode the block again if the machine that holds it goes.
        """

    def exhausted(self) -> bool:
        """Whether ``take`` has given everything."""

    def actors_wanted(self) -> int:
        """Number of actors that are to decode at the moment, where actors do."""

    def cpus_wanted(self) -> int:
        """CPUs that the cluster's autoscaler is to provide for decoding; 0 asks for none."""

    def rest(self, timeout_s: float) -> None:
        """Waits until ``take`` may have something to give, at most ``timeout_s``."""

    def end(self) -> None:
        """Sets ``ended``."""


# The inputs of this process's streams.
_INPUTS: weakref.WeakSet[_Input] = weakref.WeakSet()


class _Input(InputDataBuffer):
    """The physical operator: asks its source for one block after another."""

    def __init__(self, context: DataContext, source: Source):
        super().__init__(context, input_data=[])
        self._is_execution_marked_finished = False
        self._source = source
        self._taken = 0
        self._next: pa.Table | None = None
        _INPUTS.add(self)

    def has_next(self) -> bool:
        if self._next is None and not self.has_execution_finished():
            (decode,) = self.output_dependencies
            self._next = self._source.take(self._taken - decode.metrics.num_tasks_finished)
        return self._next is not None

    def _get_next_inner(self) -> RefBundle:
        table, self._next = self._next, None
        self._taken += 1
        metadata = BlockMetadata(table.num_rows, table.nbytes, input_files=None, exec_stats=None)
        ref = ray.put(table)
        self._source.keep(ref)
        return RefBundle((BlockEntry(ref, metadata),), schema=table.schema, owns_blocks=False)

    def has_execution_finished(self) -> bool:
        return self._is_execution_marked_finished or (self._next is None and self._source.exhausted())


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class _LogicalInput(LogicalOperator, SourceOperator):
    """The same in a plan. Read by Ray: it shows all fields of an operator that are no more than data."""

    source: Source

    def output_data(self) -> None:
        return None


def _plan(operator: _LogicalInput, children: list, context: DataContext) -> _Input:
    return _Input(context, operator.source)


Planner._DEFAULT_PLAN_FNS[_LogicalInput] = _plan


class _Demand(DefaultClusterAutoscalerV2):
    """Asks the autoscaler for the CPUs that the source wants.

    Ray's own rule asks for more whenever the CPUs are in use, as those of waiting actors always are. Requests of all
    ranks and of Ray Train meet in one actor of Ray's; those that are not renewed expire, as after a kill of the run.
    """

    # Seconds between two requests, and until one expires.
    EVERY_S = 5.0
    AUTOSCALING_REQUEST_EXPIRE_TIME_S = 60

    def __init__(self, source: Source, pools: list[AutoscalingActorPool], resource_manager: Any, **named: Any):
        super().__init__(resource_manager, **named)
        self._source = source
        self._pools = pools

    def try_trigger_scaling(self) -> None:
        self._size_pools()
        if self._get_time() - self._last_request_time >= self.EVERY_S:
            self._send_resource_request([{"CPU": 1}] * self._source.cpus_wanted())

    def _size_pools(self) -> None:
        """Has Ray end idle actors beyond those that the source wants, and start missing ones.

        Actors of a machine that was lost restart on another one, and with them the blocks that they had: as soon as
        idle ones have made room there.
        """
        size = self._source.actors_wanted()
        for pool in self._pools:
            if (pool.min_size(), pool.max_size()) != (size, size):
                pool._config = dataclasses.replace(pool._config, min_size=size, max_size=size, initial_size=size)


def _create_cluster_autoscaler(topology: Any, resource_manager: Any, context: DataContext, *, execution_id: str) -> Any:
    inputs = [operator for operator in topology if isinstance(operator, _Input)]
    if not inputs:
        return create_cluster_autoscaler(topology, resource_manager, context, execution_id=execution_id)
    pools = [pool for operator in topology for pool in operator.get_autoscaling_actor_pools()]
    return _Demand(inputs[0]._source, pools, resource_manager, execution_id=execution_id)


streaming_executor.create_cluster_autoscaler = _create_cluster_autoscaler


def dataset_of(source: Source) -> Dataset:
    """The data set of a source's blocks, in the settings of the current ``DataContext``."""
    context = DataContext.get_current().copy()
    stats: Any = DatasetStats(metadata={}, parent=None)
    return Dataset(LogicalPlan(_LogicalInput(source), context), context, stats)


def blocks_of(dataset: Dataset) -> Iterator[ray.ObjectRef]:
    """The blocks of a data set as they are decoded. Its execution begins when the first one is asked for."""
    for bundle in dataset.iter_internal_ref_bundles():
        yield from bundle.block_refs


def source_of(executor: Any) -> Source:
    """The source of an execution. executor: of ``DataContext.custom_execution_callback_classes``' callbacks."""
    (source,) = (operator._source for operator in executor._topology if isinstance(operator, _Input))
    return source


def living_actors() -> int:
    """Number of actors that decode for this process at the moment; 0 where tasks do."""
    decodes = [operator for one in list(_INPUTS) for operator in one.output_dependencies]
    return sum(decode.get_actor_info().running for decode in decodes)


def has_running_tasks(executor: Any) -> bool:
    """Whether a task of an execution runs."""
    return any(operator.num_active_tasks() for operator in executor._topology)
