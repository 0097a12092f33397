"""Private parts of Ray are touched in one file, and are what they were when it was written."""

import inspect
import re
from pathlib import Path

import pytest
import ray
from ray._private.node import Node
from ray.data import DataContext
from ray.data._internal.execution.backpressure_policy import ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.interfaces.op_runtime_metrics import OpRuntimeMetrics
from ray.data._internal.execution.interfaces.physical_operator import PhysicalOperator
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.data._internal.planner.planner import Planner
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.jax import JaxTrainer

from pipeline.cluster import ray_private, ray_train
from pipeline.cluster.scheduler_pause import SchedulerPause

ROOT = Path(__file__).resolve().parents[3]


def test_private_parts_of_ray_are_touched_in_three_files():
    parts = "topology|base_exc|register_sigint|create_default|initialize_and_run|DEFAULT_PLAN_FNS"
    private = re.compile(rf"ray(\.\w+)*\._(?!_)|_internal_|\._({parts})")
    found = {
        str(path.relative_to(ROOT))
        for folder in ("pipeline", "benchmarks", "jobs", "model")
        for path in (ROOT / folder).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        # Names of loggers are no touch.
        if private.search(line) and '"ray.data._internal"' not in line
    }
    assert found == {f"pipeline/cluster/{name}.py" for name in ("ray_private", "ray_input", "ray_train")}


def test_the_version_of_ray_is_the_one_that_was_read():
    said = re.search(r"Ray (\d+\.\d+)\.\d+", ray_private.__doc__)
    assert ray.__version__.startswith(said[1] + ".")


def test_what_is_replaced_is_there():
    for name in ("_register_sigint_handler", "_create_default_callbacks", "_initialize_and_run_controller"):
        assert callable(getattr(JaxTrainer, name))
    assert "self.worker_group_cls" in inspect.getsource(TrainController)
    assert "self._get_worker_runtime_env" in inspect.getsource(WorkerGroup)
    assert "self._topology" in inspect.getsource(StreamingExecutor)
    assert "self._is_execution_marked_finished" in inspect.getsource(PhysicalOperator)
    assert "num_tasks_finished" in inspect.getsource(OpRuntimeMetrics.on_task_finished)
    assert isinstance(Planner._DEFAULT_PLAN_FNS, dict)
    assert ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY == "backpressure_policies.enabled"
    # Ray calls these by name; ours is no subclass.
    callbacks = [name for name in vars(ExecutionCallback) if not name.startswith("_")]
    assert callbacks and all(callable(getattr(SchedulerPause, name)) for name in callbacks)
    assert DataContext.get_current().custom_execution_callback_classes == []


def test_callbacks_of_other_users_are_left_out():
    trainer = object.__new__(JaxTrainer)
    cleaner = object.__new__(ray_train.PlacementGroupCleanerCallback)
    data_sets = object.__new__(ray_train.DatasetsCallback)
    for shared, kept in ((True, ["first", cleaner, "last"]), (False, ["first", "last"])):
        trainer._create_default_callbacks = lambda: ["first", cleaner, data_sets, "last"]
        ray_train.drop_callbacks(trainer, shared=shared)
        assert trainer._create_default_callbacks() == kept


def test_a_head_of_its_own_starts_no_process_for_others():
    names = ("start_monitor", "start_api_server", "start_log_monitor")
    before = [getattr(Node, name) for name in names]
    with pytest.raises(ZeroDivisionError), ray_private.lean_head():
        for name in names:
            assert getattr(Node, name) is not before and getattr(Node, name)(None) is None
        assert all(f"self.{name}(" in inspect.getsource(Node) for name in names)
        raise ZeroDivisionError
    assert [getattr(Node, name) for name in names] == before
