"""The offline job: decode the data sets of a recipe once, into Arrow shards that training can read instead."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import shutil
import sys
import time
from pathlib import Path

import ray

from pipeline import recipe as recipes
from pipeline.check import allowed_line, counts_line, no_caption_line
from pipeline.cluster.start import Cluster, start_ray
from pipeline.credentials import redacted
from pipeline.data.manifest import Manifest
from pipeline.data.shards import FORMAT, MEDIA, decode_settings, encode_rows, has_size, write_shard
from pipeline.data.sources import MediaSource
from pipeline.data.spec import DataSetSpec, DecodeLimits, TaskSpec
from pipeline.data.tokenizer import CaptionCount
from pipeline.errors import DataError, RequestError
from pipeline.files import make_folder, write_json
from pipeline.prepare import build_corpus, needed_columns
from pipeline.recipe import specs
from pipeline.stopping import Stop

# Of clips of 1 MB, a quarter of a gigabyte: large enough for any disk, little to do again after a kill.
ROWS_PER_SHARD = 256


def preprocess(
    recipe: recipes.Recipe,
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
    tasks, data_sets = specs.task_specs(recipe), specs.data_set_specs(recipe)
    jobs, limits = {}, specs.decode_limits(recipe)
    for name in only or tuple(data_sets):
        mine = [t for t in tasks.values() if t.data_set == name]
        if mine:
            data_set = dataclasses.replace(data_sets[name], shards=None)
            jobs[name] = _check(data_set, mine, out / name, limits, rows_per_shard)
    start_ray(Cluster(address=recipe.cluster.address), driver_cpus=0)
    if stop:
        # Ray takes SIGTERM for itself.
        stop.install()
    return {name: _data_set(job) for name, job in jobs.items()}


@dataclasses.dataclass(frozen=True)
class _Job:
    data_set: DataSetSpec
    modalities: tuple[str, ...]
    folder: Path
    fingerprint: dict
    limits: DecodeLimits
    rows_per_shard: int
    # Of captions, where a task uses them.
    max_characters: int | None = None

    @property
    def num_rows(self) -> int:
        return self.fingerprint["num_rows"]

    def source(self) -> MediaSource:
        return MediaSource(self.data_set, modalities=self.modalities, limits=self.limits)

    def header(self) -> dict:
        """What the shards depend on; a folder with another header is refused."""
        return {
            "format": FORMAT,
            "manifest": redacted(self.data_set.manifest),
            "rows": self.num_rows,
            "fingerprint": self.fingerprint,
            "rows_per_shard": self.rows_per_shard,
            "modalities": list(self.modalities),
            "settings": decode_settings(self.data_set),
        }


def _check(
    data_set: DataSetSpec, tasks: list[TaskSpec], folder: Path, limits: DecodeLimits, rows_per_shard: int
) -> _Job:
    manifest = Manifest(data_set.manifest)
    for task in tasks:
        manifest.require(needed_columns(task, has=set(manifest.schema.names)))
    used = {m for task in tasks for m in task.modalities}
    media = tuple(m for m in MEDIA if m in used)
    captioned = [t.max_characters for t in tasks if "text" in t.modalities and t.text == "captions"]
    job = _Job(data_set, media, folder, manifest.fingerprint, limits, rows_per_shard, max(captioned, default=None))
    make_folder(folder, "--out")
    path = folder / "header.json"
    if path.exists() and json.loads(path.read_text()) != job.header():
        raise RequestError(
            f"--out {folder}: its shards are of other rows or made with other settings; use another folder or remove it"
        )
    _check_disk(job)
    write_json(path, job.header())
    return job


def _check_disk(job: _Job) -> None:
    """Refuses to start what cannot fit: the size of the first rows times their number."""
    sample = range(min(8, job.num_rows))
    table, _ = encode_rows(job.source(), sample)
    done = sum(p.stat().st_size for p in job.folder.glob("shard-*.arrow"))
    needed = table.nbytes / len(sample) * job.num_rows - done
    free = shutil.disk_usage(job.folder).free
    print(f"{job.data_set.name}: {job.num_rows} rows, about {(needed + done) / 1e9:.2f} GB of shards", flush=True)
    if needed > 0.95 * free:
        raise RequestError(f"--out {job.folder}: about {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")


def _entry_path(job: _Job, number: int) -> Path:
    return job.folder / f"shard-{number:05d}.json"


# The work is one task a shard with nothing to keep in order, so plain Ray tasks do; a stream would add nothing.
@ray.remote(max_retries=2)
def _make_shard(job: _Job, number: int) -> dict:
    rows = range(number * job.rows_per_shard, min((number + 1) * job.rows_per_shard, job.num_rows))
    table, rejects = encode_rows(job.source(), rows)
    entry = write_shard(table, job.folder / f"shard-{number:05d}.arrow") | {"rejects": rejects}
    if job.max_characters is not None:
        count = CaptionCount(job.max_characters)
        for texts in table["text"].to_pylist():
            count.add(texts)
        entry["captions"] = {"rows_without": count.rows_without, "unusable": dict(count.unusable)}
    # The entry is written after its shard: a shard without one is made again.
    write_json(_entry_path(job, number), entry)
    return entry


def _data_set(job: _Job) -> dict:
    num_shards = -(-job.num_rows // job.rows_per_shard)
    entries = {n: json.loads(_entry_path(job, n).read_text()) for n in range(num_shards) if _is_done(job, n)}
    kept = sum(e["rows"] for e in entries.values())
    pending = {_make_shard.remote(job, n): n for n in range(num_shards) if n not in entries}
    began, last = time.monotonic(), 0.0
    while pending:
        done, _ = ray.wait(list(pending), num_returns=1, timeout=1.0)
        for ref in done:
            entries[pending.pop(ref)] = _result(ref)
        if time.monotonic() - last > 5.0 or not pending:
            last = time.monotonic()
            _print_progress(job, sum(e["rows"] for e in entries.values()), kept, began)
    return _write_index(job, [entries[n] for n in range(num_shards)])


def _result(ref) -> dict:
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as e:
        if isinstance(e.cause, (DataError, RequestError)):
            raise e.cause from None
        raise


def _is_done(job: _Job, number: int) -> bool:
    path = job.folder / f"shard-{number:05d}.arrow"
    entry = _entry_path(job, number)
    return entry.exists() and has_size(path, json.loads(entry.read_text()))


def _print_progress(job: _Job, rows: int, kept: int, began: float) -> None:
    rate = (rows - kept) / max(time.monotonic() - began, 1e-6)
    left = (job.num_rows - rows) / rate if rate else 0.0
    line = f"{job.data_set.name}: {rows}/{job.num_rows} rows, {rate:.0f} rows/s, {left:.0f} s left"
    print(
        ("\r" + line if sys.stdout.isatty() else line), end="" if sys.stdout.isatty() and rows < job.num_rows else "\n"
    )
    sys.stdout.flush()


def _write_index(job: _Job, entries: list[dict]) -> dict:
    """index.json makes the folder readable: it is written last."""
    rejects = [r for e in entries for r in e["rejects"]]
    shards = [{k: e[k] for k in ("file", "rows", "bytes", "sha256", "words")} for e in entries]
    write_json(job.folder / "index.json", job.header() | {"shards": shards, "rejects": rejects})
    summary = {
        "rows": job.num_rows,
        "shards": len(shards),
        "bytes": sum(e["bytes"] for e in shards),
        "rejected": len(rejects),
    }
    counts = counts_line(collections.Counter(sorted(r["reason"] for r in rejects)))
    rejected = f"{counts} of {job.num_rows} rows; {allowed_line(job.data_set)}" if rejects else "none"
    print(f"{job.data_set.name}: {summary['shards']} shards, {summary['bytes'] / 1e6:.1f} MB, rejected: {rejected}")
    _print_captions(job, [e["captions"] for e in entries if "captions" in e])
    print(f"train from them with --set data_sets.{job.data_set.name}.shards={os.path.abspath(job.folder)}", flush=True)
    return summary


def _print_captions(job: _Job, counts: list[dict]) -> None:
    """Says what training would find: shards hold captions as they are."""
    without, unusable = sum(c["rows_without"] for c in counts), collections.Counter()
    for count in counts:
        unusable.update(count["unusable"])
    if without:
        line = no_caption_line(without, f"{job.num_rows} rows", dict(sorted(unusable.items())), job.data_set)
        print(f"{job.data_set.name}: {line}")
