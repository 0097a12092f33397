"""``cluster.yaml``'s types of machines under Ray's own autoscaler, each a process: they come and go with need."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.ray_head import ray_head

ROOT = Path(__file__).resolve().parent.parent
# CPUs of the types here; a worker of two fits on a trainer alone.
CPUS = {"decode": 1, "gpu_trainer": 2}
# A decoder that one CPU is too few for until the test says "calm", in a module of the user's own.
SLOW = """
import pathlib, time
from pipeline.data.media.image import BUILT_IN
CALM = pathlib.Path(__file__).with_name("calm")

def image(source, spec, **times):
    if not CALM.exists():
        time.sleep(0.1)
    return BUILT_IN["pillow"](source, spec, **times)
"""
# In every process: CPUs are given back after a calm of seconds, and steps are slow while the test says so.
PATCH = """
import pathlib, time
from pipeline.cluster.decode_demand import DecodeDemand
from pipeline.train.watchdog import Watchdog
CALM, HURRY = (pathlib.Path(__file__).with_name(name) for name in ("calm", "hurry"))
DecodeDemand.window_s, DecodeDemand.calm_windows = 1.0, 5
heartbeat = Watchdog.heartbeat

def slow_step(dog, finished):
    if finished.startswith("step") and CALM.exists() and not HURRY.exists():
        time.sleep(3)
    heartbeat(dog, finished)

Watchdog.heartbeat = slow_step
"""
STEPS = 60
# Machines: one of a worker and one that decodes; another one that decodes.
ONE, TWO = ({"decode": number, "gpu_trainer": 1} for number in (1, 2))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def local_types() -> dict:
    """The decode pool and the GPU trainer of cluster.yaml, their CPUs fewer and without the GPUs."""
    types = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))["available_node_types"]
    bounds = {name: {key: types[name][key] for key in ("min_workers", "max_workers")} for name in CPUS}
    bounds["decode"]["max_workers"] = 2
    return {name: bounds[name] | {"resources": {"CPU": cpus}} for name, cpus in CPUS.items()}


# Prints the CPUs of each living machine, again and again; joins before there are others than the head.
WATCH = """
import json, os, sys, time, ray
# Ray has lines of its own for stdout, on machines that come and go.
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
ray.init(address=sys.argv[1], logging_level="error", log_to_driver=False)
while True:
    print(json.dumps([n["Resources"].get("CPU", 0) for n in ray.nodes() if n["Alive"]]), file=out, flush=True)
    time.sleep(0.5)
"""


class Watch:
    """The living machines, from a process that looks all the time. seen: type → number, at each look."""

    def __init__(self, head) -> None:
        command = [sys.executable, "-c", WATCH, head.address]
        self._process = subprocess.Popen(command, env=head.environment, stdout=subprocess.PIPE, text=True)
        self.seen: list[dict[str, int]] = []
        self.look()

    def look(self) -> dict[str, int]:
        cpus = json.loads(self._process.stdout.readline())
        self.seen.append({name: cpus.count(one) for name, one in CPUS.items()})
        return self.seen[-1]

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()


def recipe_file(recipe: dict, folder: Path) -> Path:
    """One task over pictures that decode slowly, and a worker that takes a trainer's two CPUs."""
    (folder / "own.py").write_text(SLOW)
    (folder / "sitecustomize.py").write_text(PATCH)
    digits = recipe["data_sets"]["digits"]
    digits["image"]["decoder"] = "own:image"
    task = recipe["tasks"]["classes"] | {"variants": [{"size": 16}]}
    recipe |= {"data_sets": {"digits": digits}, "tasks": {"classes": task}}
    recipe["train"]["num_steps"] = STEPS
    recipe["evaluate"] = []
    recipe["cluster"] = {"num_workers": 1, "cpus_per_worker": 2, "decode_cpus": [1, 2], "block_steps": 1}
    # A few batches: the stream lasts as long as the run.
    recipe["cluster"]["decode_ahead"] = 1e-5
    del recipe["text"]
    (folder / "slow.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "slow.yaml"


def test_machines_come_for_a_worker_and_for_decoding_and_go(make_toy_recipe, tmp_path):
    config, run_dir = recipe_file(make_toy_recipe(), tmp_path), tmp_path / "run"
    environment = {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    with ray_head("--num-cpus=0", node_types=local_types(), **environment) as head, Watch(head) as watch:
        assert watch.seen == [{"decode": 0, "gpu_trainer": 0}]
        with open(tmp_path / "log", "w") as log:
            process = subprocess.Popen(
                [sys.executable, ROOT / "jobs/pretrain.py", "--config", config, "--run-dir", run_dir],
                env=head.environment | {"RAY_ADDRESS": head.address},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            deadline = time.monotonic() + 240
            while process.poll() is None and time.monotonic() < deadline:
                now = watch.look()
                if now == TWO:
                    (tmp_path / "calm").touch()
                elif now == ONE and TWO in watch.seen and not (tmp_path / "hurry").exists():
                    # Given back while the run trains.
                    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) < STEPS
                    (tmp_path / "hurry").touch()
        finally:
            process.kill()
        said = (tmp_path / "log").read_text()
        assert process.returncode == 0, f"{said}{watch.seen}"
        # One machine for the worker; one, then two that decode, as training waits for data; one once it does not.
        assert ONE in watch.seen and TWO in watch.seen, watch.seen
        assert (tmp_path / "hurry").exists(), f"{said}{watch.seen}"
        assert max(one["gpu_trainer"] for one in watch.seen) == 1
        # Nothing asks any more.
        deadline = time.monotonic() + 90
        while any(watch.look().values()):
            assert time.monotonic() < deadline, head.ray("status", "-v", "--address", head.address).stdout
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == STEPS
