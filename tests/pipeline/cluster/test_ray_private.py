"""Private parts of Ray are touched in one file, and are what they were when it was written."""

import inspect
import re
from pathlib import Path

import ray
from ray._private import node
from ray.data import DataContext
from ray.data._internal.execution.backpressure_policy import ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.interfaces.op_runtime_metrics import OpRuntimeMetrics
from ray.data._internal.execution.interfaces.physical_operator import PhysicalOperator
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.data._internal.planner.planner import Planner
from ray.train.v2.jax import JaxTrainer

from pipeline.cluster import ray_private
from pipeline.cluster.scheduler_pause import SchedulerPause

ROOT = Path(__file__).resolve().parents[3]


def test_private_parts_of_ray_are_touched_in_two_files():
    parts = "topology|base_exc|register_sigint|create_default|DEFAULT_PLAN_FNS"
    private = re.compile(rf"ray(\.\w+)*\._(?!_)|_internal_|\._({parts})")
    found = {
        str(path.relative_to(ROOT))
        for folder in ("pipeline", "benchmarks", "jobs", "model")
        for path in (ROOT / folder).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        # Names of loggers are no touch.
        if private.search(line) and '"ray.data._internal"' not in line
    }
    assert found == {"pipeline/cluster/ray_private.py", "pipeline/cluster/ray_input.py"}


def test_the_version_of_ray_is_the_one_that_was_read():
    said = re.search(r"Ray (\d+\.\d+)\.\d+", ray_private.__doc__)
    assert ray.__version__.startswith(said[1] + ".")


def test_what_is_replaced_is_there():
    for name in ("_register_sigint_handler", "_create_default_callbacks"):
        assert callable(getattr(JaxTrainer, name))
    assert "self._topology" in inspect.getsource(StreamingExecutor)
    assert "self._is_execution_marked_finished" in inspect.getsource(PhysicalOperator)
    assert "num_tasks_finished" in inspect.getsource(OpRuntimeMetrics.on_task_finished)
    assert isinstance(Planner._DEFAULT_PLAN_FNS, dict)
    assert ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY == "backpressure_policies.enabled"
    # Ray calls these by name; ours is no subclass.
    callbacks = [name for name in vars(ExecutionCallback) if not name.startswith("_")]
    assert callbacks and all(callable(getattr(SchedulerPause, name)) for name in callbacks)
    assert DataContext.get_current().custom_execution_callback_classes == []


def test_the_group_cleaner_alone_is_left_out():
    trainer = object.__new__(JaxTrainer)
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    cleaner = object.__new__(PlacementGroupCleanerCallback)
    trainer._create_default_callbacks = lambda: ["first", cleaner, "last"]
    ray_private.drop_group_cleaner(trainer)
    assert trainer._create_default_callbacks() == ["first", "last"]


def test_a_ray_of_our_own_starts_its_log_monitor_by_a_method_of_its_node(monkeypatch):
    monkeypatch.setattr(node.Node, "start_log_monitor", start := node.Node.start_log_monitor)
    assert "start_log_monitor()" in inspect.getsource(node.Node.start_ray_processes)
    ray_private.start_no_log_monitor()
    assert node.Node.start_log_monitor is not start and node.Node.start_log_monitor(None) is None
