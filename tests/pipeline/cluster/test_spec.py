"""The cluster of a run as plain data."""

import subprocess
import sys
from pathlib import Path

from pipeline.cluster.spec import Cluster

ROOT = Path(__file__).resolve().parents[3]


def test_an_address_is_what_joins_a_cluster(monkeypatch):
    assert Cluster().joins is None and Cluster(address="local").joins is None
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert Cluster().joins == "10.0.0.1:6379" and Cluster(address="auto").joins == "auto"
    assert Cluster(address="local").joins is None


def test_it_is_read_without_ray():
    code = "import pipeline.cluster.spec, sys; print({'ray', 'jax'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.strip() == "set()", done.stdout + done.stderr
