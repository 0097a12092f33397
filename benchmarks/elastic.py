"""A run on a real Ray cluster of two nodes on this machine: a node dies, one joins, one is preempted. JSON on output.

    python -m benchmarks.elastic [--only lost|preempted]

lost: a run of one or two workers (``cluster.num_workers: [1, 2]``) loses a node to SIGKILL; it must go on with one
worker by itself, and with two again once a node joins. preempted: a run of two workers whose node is drained as a
spot machine is (``ray drain-node``, 40 seconds' notice) must save and exit with 75. Times are seconds from the event;
every step must be in metrics.jsonl once. Each takes some five minutes: Ray itself waits a minute before it gives up a
size, and looks once a minute for room to grow.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from benchmarks.campaign_run import last_step, recipe, records, say

ROOT = Path(__file__).resolve().parent.parent
# Each node has room for one worker of two CPUs, and one CPU to decode.
NODE = {"num_cpus": 3, "object_store_memory": 300 << 20}


class Job:
    """The job on a cluster of two nodes."""

    def __init__(self, folder: Path, corpus: Path, *, num_workers: str):
        from ray.cluster_utils import Cluster

        self.run_dir, self._log = folder / "run", folder / "log.txt"
        self.cluster = Cluster(initialize_head=True, head_node_args=NODE)
        self.second = self.cluster.add_node(**NODE)
        config = folder / "recipe.yaml"
        config.write_text(yaml.safe_dump(recipe(corpus, folder / "compiled", num_steps=20_000)))
        settings = {
            "cluster.num_workers": num_workers,
            "cluster.address": self.cluster.address,
            "cluster.cpus_per_worker": "2",
            "train.checkpoint_every": "20",
        }
        command = [sys.executable, str(ROOT / "jobs/pretrain.py"), "--config", str(config), "--run-dir"]
        command += [str(self.run_dir), *(x for key, value in settings.items() for x in ("--set", f"{key}={value}"))]
        with open(self._log, "w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"JAX_PLATFORMS": "cpu"}
            )

    def wait(self, ready, *, timeout_s: float = 300) -> float:
        """Seconds until ``ready()`` is true; raises RuntimeError after the timeout or if the job ends."""
        began = time.monotonic()
        while not ready():
            if time.monotonic() - began > timeout_s or self.process.poll() is not None:
                raise RuntimeError(f"not ready after {timeout_s} s; {self._log.read_text()[-3000:]}")
            time.sleep(0.2)
        return time.monotonic() - began

    def says(self, text: str) -> bool:
        return text in self._log.read_text()

    def close(self) -> dict:
        """Ends the run by SIGTERM if it still runs. Returns its exit code and whether every step was logged once."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=150)
        steps = [r["step"] for r in records(self.run_dir)]
        self.cluster.shutdown()
        return {"exit code": code, "every step once": steps == list(range(1, len(steps) + 1)), "steps": len(steps)}


def lost(folder: Path, corpus: Path) -> dict:
    job = Job(folder, corpus, num_workers="[1, 2]")
    job.wait(lambda: last_step(job.run_dir) >= 30)
    before = last_step(job.run_dir)
    say(f"a node is killed after step {before}")
    job.cluster.remove_node(job.second, allow_graceful=False)
    found = {"one worker, s": job.wait(lambda: job.says("workers started again: 1 of them"))}
    say(f"{found}; a node joins")
    job.cluster.add_node(**NODE)
    found["two workers again, s"] = job.wait(lambda: job.says("workers started again: 2 of them"))
    grown = last_step(job.run_dir)
    job.wait(lambda: last_step(job.run_dir) > grown + 5)
    return found | job.close()


def preempted(folder: Path, corpus: Path) -> dict:
    job = Job(folder, corpus, num_workers="2")
    job.wait(lambda: last_step(job.run_dir) >= 30)
    say(f"a node is drained after step {last_step(job.run_dir)}")
    began = time.monotonic()
    drain = "drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message spot --deadline-remaining-seconds 40"
    command = [sys.executable, "-m", "ray.scripts.scripts", *drain.split()]
    subprocess.run([*command, "--address", job.cluster.address, "--node-id", job.second.node_id], check=True)
    job.process.wait(timeout=120)
    return {"notice to exit, s": time.monotonic() - began} | job.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("lost", "preempted"))
    args = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from pipeline.data import demo

    folder = Path(tempfile.mkdtemp())
    corpus = demo.build(folder / "corpus", limit=48, progress=False)
    found = {}
    for name, story in {"lost": lost, "preempted": preempted}.items():
        if args.only in (None, name):
            (folder / name).mkdir()
            found[name] = story(folder / name, corpus)
            say(f"{name}: {found[name]}")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
