"""Evaluation beside decoding and the model called bare: 10,000 small images by default. JSON.

    python -m benchmarks.evaluate [--quick]

decode_s: every image decoded in this process and cut into tokens, one after the other. model_s: features of the same
tokens, ready in memory. evaluate_s: the features of the manifest as ``imp evaluate`` makes them, decode processes
included. ratio: evaluate_s over decode_s + model_s; the aim is at most 1.3 on two cores.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageFilter

from benchmarks import timing
from model.config import from_variant
from model.imp import Imp
from pipeline.data.manifest import Manifest
from pipeline.data.media.clip import decode_media
from pipeline.data.sample_tokens import View, evaluation_tokens
from pipeline.data.spec import DataSetSpec, DecodeLimits, ImageSpec, TokenSpec
from pipeline.data.variants import make_variant
from pipeline.evaluate.held_out import Side, pooled_rows
from pipeline.export.features import Features, pooled

SIZES = {"quick": 1000, "cpu": 10_000}
# Pixels of a side, in the files and in the view.
_SIDE = 64


def write_images(folder: Path, count: int) -> str:
    """The manifest of PNG files of smooth noise."""
    rng = np.random.default_rng(0)
    for number in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (_SIDE, _SIDE, 3), np.uint8))
        noise.filter(ImageFilter.GaussianBlur(3)).save(folder / f"{number}.png")
    ids = [str(n) for n in range(count)]
    pq.write_table(pa.table({"id": ids, "image": [f"{n}.png" for n in ids]}), folder / "m.parquet")
    return str(folder / "m.parquet")


def side(manifest: str) -> Side:
    """The images as evaluation prepares them."""
    data_set = DataSetSpec("images", manifest, {}, image=ImageSpec(short_side=_SIDE))
    variant = make_variant(num_frames=0, size=_SIDE, drop_rate=0.0, base=None, batch_size=1, spec=TokenSpec())
    return Side("image", "vision", data_set, variant)


def bare(model: Features, images: Side) -> dict[str, float]:
    """Seconds of decoding in this process, and of the model on what was decoded."""
    began, samples = time.perf_counter(), []
    data_set, manifest = images.data_set, Manifest(images.data_set.manifest)
    for row in range(manifest.num_rows):
        array = decode_media(manifest.row(row), data_set, "image")
        view = View(images.variant)
        samples.append(evaluation_tokens(array, data_set.modality("image"), data_set.image, view, TokenSpec()))
    decoded = time.perf_counter()
    pooled(model, "vision", iter(samples))
    return {"decode_s": decoded - began, "model_s": time.perf_counter() - decoded}


def main() -> None:
    count = SIZES["quick" if timing.arguments(__doc__).quick else "cpu"]
    config = from_variant("imp-tiny-moe", vocab_size=16, dtype="float32")
    imp = Imp(config, modalities=("vision",))
    model = Features(imp, imp.init(0))
    with tempfile.TemporaryDirectory() as folder:
        images = side(write_images(Path(folder), count))
        # Compiled, and the manifest's rows copied, before anything is timed.
        pooled_rows(model, images, images.data_set.manifest, rows=range(64), limits=DecodeLimits(), sizes=TokenSpec())
        found = bare(model, images)
        began = time.perf_counter()
        pooled_rows(
            model, images, images.data_set.manifest, rows=range(count), limits=DecodeLimits(), sizes=TokenSpec()
        )
        found["evaluate_s"] = time.perf_counter() - began
    found["ratio"] = found["evaluate_s"] / (found["decode_s"] + found["model_s"])
    timing.show({"machine": timing.machine(), "images": count, **found})


if __name__ == "__main__":
    main()
