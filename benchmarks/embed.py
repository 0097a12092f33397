"""Measures ``imp embed`` beside its two parts alone: decoding into tokens, and the bare model on whole batches.

    python -m benchmarks.embed --run runs/demo [--rows 4096] [--data-set emoji]

Prints samples a second of the whole job, of decoding (the same threads and processes, no model), and of the model
(``Features.features`` and the heads on batches in memory), and two bounds. "slower part": the smaller of the two rates,
reached where decoding and model have processors of their own, as with a GPU. "shared processors": with a CPU both work
on the same cores, where no order of work takes less than the CPU seconds of both over the number of cores. Loading and
compiling are outside all three.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.manifest import Manifest
from pipeline.embed import folder as folders
from pipeline.embed import job
from pipeline.embed.decoding import Decoders, RowPreparer, in_order
from pipeline.embed.embedding import Embedder, written
from pipeline.embed.preparations import preparations, spaces_of
from pipeline.evaluate.exporting import export_model
from pipeline.evaluate.trained_model import TrainedModel
from pipeline.export import load
from pipeline.export.features import BATCH


def cpu_s() -> float:
    """CPU seconds of this process and of the children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """(seconds, CPU seconds)."""
    began, used = time.perf_counter(), cpu_s()
    work()
    return time.perf_counter() - began, cpu_s() - used


def manifest_of(source: str, rows: int, folder: Path) -> Manifest:
    """A manifest of the images of another, repeated up to a number of rows."""
    original = Manifest(source)
    found = [original.row(i % original.num_rows)["image"] for i in range(rows)]
    path = folder / "rows.parquet"
    pq.write_table(pa.table({"id": [str(i) for i in range(rows)], "image": found}), path)
    return Manifest(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--data-set", default="emoji")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    trained = TrainedModel(arguments.run)
    export_model(trained, folder / "model")
    encoder, rows = load(folder / "model"), arguments.rows
    manifest = manifest_of(trained.data_sets[arguments.data_set].manifest, rows, folder)
    spaces = spaces_of(encoder, features=False)
    chosen = {"image": preparations(encoder, "image", (arguments.data_set,), tuple(spaces))}
    one = chosen["image"][0].one

    def prepared(decoders: Decoders, numbers: range):
        make = RowPreparer(encoder, chosen, decoders, schemes=(), clips=1)
        return in_order(iter(numbers), lambda i: make(manifest.row(i)), lambda made: made[0].num_bytes)

    with Decoders() as decoders:
        samples = [made[0].samples[0][1][0] for made in prepared(decoders, range(2 * BATCH))]

    def decode() -> None:
        with Decoders() as decoders:
            for _ in prepared(decoders, range(rows)):
                pass

    def model() -> None:
        for _ in range(0, rows, BATCH):
            features = encoder.model.features(one.embedder, samples[:BATCH])
            encoder.vectors(features[:, None], one)

    def whole() -> None:
        (folder / "parts").mkdir()
        with Decoders() as decoders:
            make = RowPreparer(encoder, chosen, decoders, schemes=(), clips=1)
            parts = range(folders.num_parts(rows))
            found = Embedder(encoder).parts(job.rows_of(manifest, 0, parts, make))
            for _ in written(found, job.part_writer(folder, spaces)):
                pass

    model()  # compiles
    found = {name: timed(work) for name, work in (("decode", decode), ("model", model), ("embed", whole))}
    shutil.rmtree(folder)
    for name, (seconds, used) in found.items():
        print(f"{name:7} {rows / seconds:8.1f} samples/s, {used / rows * 1e3:.2f} CPU ms a sample")
    slower = max(found["decode"][0], found["model"][0])
    shared = (found["decode"][1] + found["model"][1]) / len(os.sched_getaffinity(0))
    print(f"embed / slower part: {slower / found['embed'][0]:.2f}")
    if jax.default_backend() == "cpu":
        print(f"embed / shared processors: {shared / found['embed'][0]:.2f}")


if __name__ == "__main__":
    main()
