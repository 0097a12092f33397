"""Many tasks on a small machine: the time until every stream has its first batch, and the memory that takes.

    python -m benchmarks.streams [--tasks 20] [--config configs/demo.yaml]

Takes the tasks of a recipe in turn, each time under another name, so that all orders differ. JSON on standard output.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path

import psutil

from pipeline import recipe as recipes
from pipeline.corpus import build_corpus
from pipeline.plan import plan


def many_tasks(recipe: recipes.Recipe, count: int) -> recipes.Recipe:
    """The recipe with ``count`` tasks, those it has in turn."""
    plain, names = recipe.to_dict(), list(recipe.tasks)
    plain["tasks"] = {f"{names[i % len(names)]}_{i}": plain["tasks"][names[i % len(names)]] for i in range(count)}
    plain["evaluate"] = []
    return recipes.from_dict(plain)


class Memory(threading.Thread):
    """Watches the proportional set size of this process and all below it."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self.processes = 0
        self._stop_asked = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._stop_asked.wait(1.0):
            family = [psutil.Process(), *psutil.Process().children(recursive=True)]
            self.processes = max(self.processes, len(family))
            self.peak_bytes = max(self.peak_bytes, sum(map(_pss, family)))

    def stop(self) -> None:
        self._stop_asked.set()
        self.join()


def _pss(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0


def measure(recipe: recipes.Recipe, run_dir: Path) -> dict:
    from pipeline.cluster.start import start_ray
    from pipeline.cluster.task_streams import open_queues
    from pipeline.recipe import specs
    from pipeline.train.mixture.schedule import START

    spec = plan(recipe, run_dir)
    memory, cluster = Memory(), specs.cluster_spec(recipe)
    began = time.perf_counter()
    start_ray(cluster)
    ray_s = time.perf_counter() - began
    schedule = spec.schedule(START)
    queues = open_queues(spec, cluster, schedule, bad={})
    first_s = {}
    for name, queue in queues.items():
        queue.next()
        first_s[name] = round(time.perf_counter() - began, 1)
    time.sleep(5)
    memory.stop()
    return {
        "tasks": len(queues),
        "cpus": os.cpu_count(),
        "start_ray_s": round(ray_s, 1),
        "all_first_batches_s": max(first_s.values()),
        "peak_pss_gb": round(memory.peak_bytes / 1e9, 2),
        "max_processes": memory.processes,
        "first_batch_s": first_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--config", default="configs/demo.yaml")
    arguments = parser.parse_args()
    recipe = many_tasks(recipes.load(arguments.config), arguments.tasks)
    build_corpus(recipe)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(recipe, Path(folder)), indent=2), flush=True)
    os._exit(0)  # the streams have no end worth waiting for


if __name__ == "__main__":
    main()
