"""The offline job: decode the data sets of a recipe once, into Arrow shards that training can read instead."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.cluster.spec import Cluster
from pipeline.cluster.start import start_ray
from pipeline.cluster.tasks import run_tasks
from pipeline.corpus import build_corpus
from pipeline.data.columns import needed_columns
from pipeline.data.manifest import Manifest
from pipeline.data.shard_index import same_shards, write_index
from pipeline.data.shard_job import ShardJob
from pipeline.data.shards import encode_rows
from pipeline.data.spec import DataSetSpec, DecodeLimits, TaskSpec
from pipeline.errors import DataError, RequestError
from pipeline.files import make_folder, write_json
from pipeline.recipe import Recipe, specs
from pipeline.reject_lines import allowed_line, counts_line, no_caption_line
from pipeline.stopping import Stop

# A quarter of a gigabyte with clips of 1 MB: large enough for any disk, little to do again after a kill.
ROWS_PER_SHARD = 256
# Seconds between two lines of progress.
_PROGRESS_S = 5.0


def preprocess(
    recipe: Recipe,
    out: Path,
    *,
    only: tuple[str, ...] = (),
    rows_per_shard: int = ROWS_PER_SHARD,
    stop: Stop | None = None,
) -> dict:
    """Writes out/NAME/ for each data set and prints progress. Finished shards of an earlier try are kept.

    only: data sets to do; all by default. stop: what signals have asked for. Returns {name: {"rows", "shards", "bytes",
    "rejected"}}.
    """
    unknown = set(only) - set(recipe.data_sets)
    if unknown:
        raise RequestError(f"--only {', '.join(sorted(unknown))}: the recipe has {', '.join(recipe.data_sets)}")
    build_corpus(recipe)
    jobs = _jobs(recipe, out, only=only, rows_per_shard=rows_per_shard)
    start_ray(Cluster(address=recipe.cluster.address), driver_cpus=0)
    if stop:
        # Ray takes SIGTERM for itself.
        stop.install()
    return {name: _make(job) for name, job in jobs.items()}


def _jobs(recipe: Recipe, out: Path, *, only: tuple[str, ...], rows_per_shard: int) -> dict[str, ShardJob]:
    """Data set → its job, checked; data sets that no task uses are left out."""
    tasks, data_sets = specs.task_specs(recipe), specs.data_set_specs(recipe)
    jobs, limits = {}, specs.decode_limits(recipe)
    for name in only or tuple(data_sets):
        mine = [t for t in tasks.values() if t.data_set == name]
        if mine:
            data_set = dataclasses.replace(data_sets[name], shards=None)
            jobs[name] = _checked_job(data_set, mine, out / name, limits, rows_per_shard)
    return jobs


def _checked_job(
    data_set: DataSetSpec, tasks: list[TaskSpec], folder: Path, limits: DecodeLimits, rows_per_shard: int
) -> ShardJob:
    """The job of one data set. Raises RequestError if columns, the folder or the disk do not allow it."""
    manifest = Manifest(data_set.manifest, media=data_set.media_columns)
    for task in tasks:
        manifest.require(needed_columns(task, data_set, has=set(manifest.schema.names)))
    used = {m for task in tasks for m in task.modalities}
    media = tuple(m for m in data_set.media if m in used)
    captioned = [t.max_characters for t in tasks if "text" in t.modalities and t.text == "captions"]
    # Other machines then read the rows that this one has found.
    data_set = dataclasses.replace(data_set, index=manifest.index)
    job = ShardJob(data_set, media, folder, manifest.fingerprint, limits, rows_per_shard, max(captioned, default=None))
    make_folder(folder, "--out")
    path = folder / "header.json"
    if path.exists() and not same_shards(json.loads(path.read_text()), job.header()):
        raise RequestError(
            f"--out {folder}: its shards are of other rows or made with other settings; use another folder or remove it"
        )
    _check_disk(job)
    write_json(path, job.header())
    return job


def _check_disk(job: ShardJob) -> None:
    """Refuses to start what cannot fit: the size of the first rows times their number."""
    sample = range(min(8, job.num_rows))
    table, _ = encode_rows(job.source(), sample)
    done = sum(p.stat().st_size for p in job.folder.glob("shard-*.arrow"))
    needed = table.nbytes / len(sample) * job.num_rows - done
    free = shutil.disk_usage(job.folder).free
    whole = needed + done
    size = f"{whole / 1e9:,.1f} GB" if whole >= 1e9 else f"{whole / 1e6:.1f} MB"
    print(f"{job.data_set.name}: {job.num_rows:,} rows, about {size} of shards", flush=True)
    if needed > 0.95 * free:
        raise RequestError(f"--out {job.folder}: about {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")


def _make(job: ShardJob) -> dict:
    """Makes the shards that are missing, in the cluster, and the index of all."""
    rows = job.finished()
    kept = sum(rows.values())
    missing = [number for number in range(job.num_shards) if number not in rows]
    began, last = time.monotonic(), 0.0
    for made in run_tasks(job.make, missing):
        rows |= {number: entry["rows"] for number, entry in made.items()}
        if time.monotonic() - last > _PROGRESS_S or len(rows) == job.num_shards:
            last = time.monotonic()
            _print_progress(job, sum(rows.values()), kept, began)
    return _write_index(job)


def _print_progress(job: ShardJob, rows: int, kept: int, began: float) -> None:
    rate = (rows - kept) / max(time.monotonic() - began, 1e-6)
    left = (job.num_rows - rows) / rate if rate else 0.0
    line = f"{job.data_set.name}: {rows}/{job.num_rows} rows, {rate:.0f} rows/s, {left:.0f} s left"
    if sys.stdout.isatty():
        print("\r" + line, end="" if rows < job.num_rows else "\n", flush=True)
    else:
        print(line, flush=True)


def _write_index(job: ShardJob) -> dict:
    """Makes the folder readable. One shard's entry is in memory at a time: of many shards there are many rejects."""
    summary = {"rows": job.num_rows, "shards": job.num_shards, "bytes": 0, "rejected": 0}
    reasons: collections.Counter[str] = collections.Counter()
    without, unusable = 0, collections.Counter()

    def entries() -> Iterator[dict]:
        nonlocal without
        for number in range(job.num_shards):
            entry = job.entry(number)
            if entry is None:
                raise DataError(f"--out {job.folder}: shard {number} is gone; run the same command again")
            summary["bytes"] += entry["bytes"]
            summary["rejected"] += len(entry["rejects"])
            reasons.update(reject["reason"] for reject in entry["rejects"])
            if "captions" in entry:
                without += entry["captions"]["rows_without"]
                unusable.update(entry["captions"]["unusable"])
            yield entry

    write_index(job.folder, job.header(), entries())
    counts = counts_line(collections.Counter(dict(sorted(reasons.items()))))
    rejected = f"{counts} of {job.num_rows} rows; {allowed_line(job.data_set)}" if reasons else "none"
    print(f"{job.data_set.name}: {summary['shards']} shards, {summary['bytes'] / 1e6:.1f} MB, rejected: {rejected}")
    if without:
        line = no_caption_line(without, f"{job.num_rows} rows", dict(sorted(unusable.items())), job.data_set)
        print(f"{job.data_set.name}: {line}")
    print(f"train from them with --set data_sets.{job.data_set.name}.shards={os.path.abspath(job.folder)}", flush=True)
    return summary
