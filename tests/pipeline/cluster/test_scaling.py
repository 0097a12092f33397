"""Ray's elastic policy grows a run no further than leaves a CPU to decode with."""

import pickle

import pytest
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

from pipeline.cluster import capacity, scaling
from pipeline.cluster.scaling import scaling_config
from pipeline.cluster.spec import Cluster


@pytest.fixture
def cpus(monkeypatch):
    found = [4.0]
    monkeypatch.setattr(capacity, "cluster_cpus", lambda: found[0])
    monkeypatch.setattr(scaling, "may_grow", lambda: False)
    return found


def test_the_policy_asks_for_what_leaves_a_cpu(cpus):
    config = pickle.loads(pickle.dumps(scaling_config(Cluster(num_workers=(1, 8), address="head:6379"))))
    policy = ElasticScalingPolicy(config)
    assert policy._get_num_workers_for_resource_request() == 3
    assert policy._count_possible_workers({"a": {"CPU": 2.0}, "b": {"CPU": 2.0}}) == 3
    assert (config.min_workers, config.elasticity_enabled) == (1, True)
    # A machine joins, and goes.
    cpus[0] = 6.0
    assert policy._count_possible_workers({"a": {"CPU": 2.0}, "b": {"CPU": 2.0}, "c": {"CPU": 2.0}}) == 5
    cpus[0] = 2.0
    assert policy._count_possible_workers({"a": {"CPU": 2.0}}) == 1


def test_an_autoscaler_is_asked_for_all(cpus, monkeypatch):
    monkeypatch.setattr(scaling, "may_grow", lambda: True)
    assert scaling_config(Cluster(num_workers=(1, 8), address="head:6379")).max_workers == 8
    # A Ray of the run's own has none, whatever can be told.
    assert scaling_config(Cluster(num_workers=(1, 8), address="local")).max_workers == 3
    assert scaling_config(Cluster(num_workers=4, address="local")).max_workers == 4


def test_resources_of_a_worker():
    config = scaling_config(Cluster(num_workers=2, accelerator="gpu", accelerators_per_worker=4, cpus_per_worker=6))
    assert config.use_gpu and config.resources_per_worker == {"CPU": 6, "GPU": 4}
    tpu = Cluster(
        num_workers=2, accelerator="tpu", accelerators_per_worker=4, topology="2x2x2", accelerator_type="TPU-V4"
    )
    assert scaling_config(tpu).topology == "2x2x2" and scaling_config(tpu).use_tpu
