"""Training from shards: the wait of a step for its data, and the rate of reading shards over the disk's. JSON.

    python -m benchmarks.shards [--steps 240] [--folder DIR]

Three tasks alternate over batches of 64 clips of 256 vision tokens (50 MB a batch) through the real streams and the
real feed; the step is a sleep of 250 ms. The shards are written first, of noise: a clip is 1 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline import recipe as recipes
from pipeline.data.shard_index import FORMAT, write_index
from pipeline.data.shards import SCHEMA, ShardSource, decode_settings, encode_tensor, write_shard
from pipeline.plan import plan
from pipeline.recipe import specs

STEP_S = 0.25
TASKS, CLIPS = 3, 512
ROWS_PER_SHARD = 128


def recipe_of(folder: Path, *, steps: int) -> recipes.Recipe:
    """Three tasks over three folders of shards."""
    names = [f"films_{i}" for i in range(TASKS)]
    video = {"short_side": 128, "max_frames": 16}
    sets = {n: {"manifest": "unused.parquet", "shards": str(folder / n), "video": video} for n in names}
    task = {"objective": "softmax", "modalities": ["video"], "batch_size": 64}
    task["variants"] = [{"size": 128, "frames": 16}]
    return recipes.from_dict(
        {
            "data_sets": {n: s | {"classes": ["a", "b"]} for n, s in sets.items()},
            "tasks": {n: task | {"data_set": n, "weight": 1.0} for n in names},
            "train": {"num_steps": steps},
        }
    )


def write_shards(data_set, folder: Path, *, seed: int) -> int:
    """Shards as jobs/preprocess.py writes them, of clips of noise. Returns their bytes."""
    folder.mkdir(parents=True)
    rng, entries = np.random.default_rng(seed), []
    for number in range(CLIPS // ROWS_PER_SHARD):
        rows = [
            {
                "id": f"{number}-{i}",
                "source": "noise",
                "rejects": [],
                "text": [],
                "labels": ["a"],
                "video": encode_tensor(rng.integers(0, 256, (16, 128, 170, 3), np.uint8)),
            }
            for i in range(ROWS_PER_SHARD)
        ]
        table = pa.table({c: [r.get(c) for r in rows] for c in SCHEMA.names}, schema=SCHEMA)
        entries.append(write_shard(table, folder / f"shard-{number:05d}.arrow") | {"rejects": []})
    described = {"modalities": ["video"], "settings": decode_settings(data_set)}
    write_index(folder, {"format": FORMAT, "fingerprint": {"num_rows": CLIPS}} | described, entries)
    return sum(e["bytes"] for e in entries)


def forget(folder: Path) -> None:
    """Drops the files from the page cache."""
    for path in folder.rglob("*.arrow"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_ratio(data_set, folder: Path, *, rounds: int = 3) -> dict:
    """Bytes a second of the files read from end to end, and of every clip of every shard, from a cold cache."""
    size = sum(p.stat().st_size for p in folder.glob("*.arrow"))
    rates = {"sequential": [], "shards": []}
    for _ in range(rounds):
        forget(folder)
        began = time.perf_counter()
        for path in sorted(folder.glob("*.arrow")):
            with open(path, "rb", buffering=0) as file:
                while file.read(8 << 20):
                    pass
        rates["sequential"].append(size / (time.perf_counter() - began))
        forget(folder)
        began, source = time.perf_counter(), ShardSource(data_set, modalities=("video",))
        for row in range(source.num_rows):
            source.clip(row).media["video"].sum(dtype=np.uint8)
        rates["shards"].append(size / (time.perf_counter() - began))
    best = {name: max(values) for name, values in rates.items()}
    return {f"{name}_mb_s": round(rate / 1e6) for name, rate in best.items()} | {
        "ratio": round(best["shards"] / best["sequential"], 3)
    }


def waits(spec, recipe) -> dict:
    """Seconds waited for batches over those of the whole, after each task's first batch."""
    from pipeline.cluster.start import start_ray
    from pipeline.cluster.task_streams import open_queues
    from pipeline.train.feed import Feed
    from pipeline.train.mixture.schedule import START
    from pipeline.train.quarantine import Quarantine
    from pipeline.train.step_gate import StepGate

    cluster = specs.cluster_spec(recipe)
    start_ray(cluster)
    schedule = spec.schedule(START)
    queues = open_queues(spec, cluster, schedule, bad={})
    quarantine = Quarantine(Path(spec.run_dir), rank=0)
    began = time.perf_counter()
    # The arrays stay on the host.
    feed = Feed(schedule, queues, to_devices=lambda arrays: arrays, quarantine=quarantine, gate=StepGate())
    waited, bytes_a_step = [], 0
    first_s = None
    for _ in schedule.steps:
        asked = time.perf_counter()
        batch = feed.next()
        waited.append(time.perf_counter() - asked)
        first_s = first_s or time.perf_counter() - began
        bytes_a_step = batch.arrays["vision"]["tokens"].nbytes
        time.sleep(STEP_S)
    start = spec.mixture.num_steps // 10
    steady = waited[start:]
    return {
        "steps": len(steady),
        "mb_a_step": round(bytes_a_step / 1e6, 1),
        "first_batch_s": round(first_s, 1),
        "wait_share": round(sum(steady) / (sum(steady) + STEP_S * len(steady)), 4),
        "longest_wait_s": round(max(steady), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--folder", help="where the shards are written, 1.6 GB; a temporary folder by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        recipe = recipe_of(folder, steps=arguments.steps)
        data_sets = specs.data_set_specs(recipe)
        size = sum(write_shards(d, folder / n, seed=i) for i, (n, d) in enumerate(data_sets.items()))
        spec = plan(recipe, folder / "run")
        result = {
            "cpus": os.cpu_count(),
            "shards_gb": round(size / 1e9, 2),
            "disk": disk_ratio(next(iter(data_sets.values())), folder / next(iter(data_sets))),
            "training": waits(spec, recipe),
        }
        print(json.dumps(result, indent=1), flush=True)
        os._exit(0)  # the streams have no end worth waiting for


if __name__ == "__main__":
    main()
