"""Private parts of Ray Train 2.60, like ``ray_private``; also for processes that have not loaded JAX."""

from __future__ import annotations

import builtins
import dataclasses
import os
from typing import Any

import ray
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.logging import patch_print
from ray.train.v2.jax import JaxConfig, JaxTrainer
from ray.train.v2.jax.config import _JaxBackend


@dataclasses.dataclass
class PlainJaxConfig(JaxConfig):
    """Ray's setup of ``jax.distributed`` in workers that have no environment of their own.

    platform: that JAX is pinned to in them; None leaves the choice to Ray.
    """

    platform: str | None = None

    @property
    def backend_cls(self) -> type[_JaxBackend]:
        return _PlainBackend


class _PlainBackend(_JaxBackend):
    def on_start(self, worker_group: Any, backend_config: PlainJaxConfig) -> None:
        worker_group.execute(_prepare, backend_config.platform)
        super().on_start(worker_group, backend_config)


def _prepare(platform: str | None) -> None:
    """Pins the platform before JAX is loaded, and undoes Ray's print, which would say every line twice."""
    if platform:
        os.environ["JAX_PLATFORMS"] = platform
    builtins.print = patch_print._original_print


def leave_signals_alone(trainer: JaxTrainer) -> None:
    """Keeps Ray's own handler away, which drops the workers at Ctrl-C; ours asks them to save and stop."""
    trainer._register_sigint_handler = lambda controller: None


def drop_callbacks(trainer: JaxTrainer, *, shared: bool) -> None:
    """Leaves out what Ray Train does for other users. shared: whether the cluster outlives the run.

    An actor for its data sets, of which there are none here; and in a cluster of the run's own the cleaner of placement
    groups, which end with the cluster: it complains if there is no dashboard.
    """
    dropped = DatasetsCallback if shared else (DatasetsCallback, PlacementGroupCleanerCallback)
    create = trainer._create_default_callbacks
    trainer._create_default_callbacks = lambda: [c for c in create() if not isinstance(c, dropped)]


class _Workers(WorkerGroup):
    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> Any:
        return custom_runtime_env


class _Controller(TrainController):
    worker_group_cls = _Workers


def share_processes(trainer: JaxTrainer, *, shared: bool) -> None:
    """Runs controller and workers in the environment of their Ray. shared: whether the cluster outlives the run.

    Ray Train gives them one of their own, which their decoders inherit: each process then starts twice, one after the
    other, and none of those that Ray has ready can be used. Variables of Ray Train that the user has set are passed on.
    """
    env_vars = get_env_vars_to_propagate() if shared else {}

    def run(**given: Any) -> Any:
        options = {"label_selector": {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}}
        options |= {"runtime_env": {"env_vars": env_vars}} if env_vars else {}
        controller = ray.remote(num_cpus=0, **options)(_Controller).remote(**given)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())

    trainer._initialize_and_run_controller = run
