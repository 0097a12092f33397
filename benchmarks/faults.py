"""A fifth of all files broken in every known way, through real streams: nothing crashes, nothing is lost.

    python -m benchmarks.faults [--files 2000]

Also decoders that raise SIGSEGV and decoders that sleep for ever holding the GIL, in the streams' own processes. JSON
on standard output; exit status 1 if a promise does not hold.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.broken_media import BROKEN, GOOD, write_broken
from benchmarks.media import write_manifest
from benchmarks.one_stream import rows_of
from pipeline.cluster.spec import Cluster
from pipeline.cluster.start import quiet_ray_data, start_ray
from pipeline.data.known_rejects import NONE_KNOWN
from pipeline.data.manifest import Manifest
from pipeline.data.media.process import DecodeLimits
from pipeline.data.spec import AudioSpec, DataSetSpec, ImageSpec, TaskSpec, TokenSpec, Variant, VideoSpec
from pipeline.data.stream_spec import StreamSpec
from pipeline.data.variants import make_variant

SHARES = {"image": 0.5, "video": 0.3, "audio": 0.2}
BATCH = 10


def write_files(folder: Path, modality: str, count: int) -> tuple[str, dict[str, tuple[str, ...]]]:
    """(manifest, {id of a broken file: the reasons it may get}); every fifth file is broken, the kinds in turn."""
    rows, broken = [], {}
    (folder / modality).mkdir()
    for number in range(count):
        path = folder / modality / f"{number:05d}.bin"
        row_id = f"{modality}-{number:05d}"
        if number % 5 == 2:
            kind = BROKEN[modality][number // 5 % len(BROKEN[modality])]
            write_broken(path, modality, kind, number)
            broken[row_id] = kind.reasons
        else:
            path.write_bytes(GOOD[modality](number))
        rows.append({"id": row_id, modality: str(path)})
    return write_manifest(folder / f"{modality}.parquet", rows), broken


def stream_spec(modality: str, manifest: str, *, timeout_s: float) -> StreamSpec:
    """One epoch of a task on the files of one modality."""
    if modality == "audio":
        variant = Variant("all", BATCH)
    else:
        frames = 8 if modality == "video" else 0
        variant = make_variant(num_frames=frames, size=32, drop_rate=0.0, base=None, batch_size=BATCH, spec=TokenSpec())
    data_set = DataSetSpec(
        name=modality,
        manifest=manifest,
        held_out={},
        image=ImageSpec(short_side=32, decoder="tests.decoders:deadly_image"),
        video=VideoSpec(fps=8.0, short_side=32, max_frames=8, decoder="tests.decoders:deadly_video"),
        audio=AudioSpec(
            frame_length=512, hop_length=256, num_frames=16, num_mels=32, decoder="tests.decoders:deadly_audio"
        ),
    )
    fingerprint = Manifest(manifest).fingerprint
    return StreamSpec(
        task=TaskSpec(modality, modality, (("nce", 1.0),), (modality,), (variant,), positives="instance"),
        data_set=data_set,
        tokens=TokenSpec(),
        tokenizer=None,
        seed=1,
        fingerprint=fingerprint,
        start=0,
        stop=fingerprint["num_rows"] // BATCH,
        share=1.0,
        known_bad=NONE_KNOWN,
        cache_bytes=0,
        limits=DecodeLimits(timeout_s=timeout_s),
    )


def check_stream(spec: StreamSpec, broken: dict[str, tuple[str, ...]]) -> dict:
    """What one epoch gave: a list of broken promises, empty where all hold, and the rejects by reason."""
    rows = list(rows_of(spec))
    ids = [i for row in rows for i in row.ids]
    found = {r["id"]: r["reason"] for row in rows for r in row.rejects}
    manifest, order = Manifest(spec.data_set.manifest), spec.maker().plan.order
    planned = [manifest.row(int(n))["id"] for n in order.rows(np.arange(len(ids)))[0]]
    wrong = [f"{i}: not listed" for i in broken if i not in found]
    wrong += [f"{i}: a good file was rejected ({r})" for i, r in found.items() if i not in broken]
    wrong += [f"{i}: {r}, not {broken[i]}" for i, r in found.items() if r not in broken.get(i, (r,))]
    wrong += [
        f"{want}: {got} in its place"
        for want, got in zip(planned, ids, strict=True)
        if want not in broken and want != got
    ]
    wrong += [f"{got}: a broken file was used" for got in ids if got in broken]
    return {"ids": len(ids), "listed": len(found), "reasons": dict(collections.Counter(found.values())), "wrong": wrong}


def run(folder: Path, *, files: int, timeout_s: float = 1.0) -> dict:
    """All modalities, one stream after another."""
    out = {}
    for modality, share in SHARES.items():
        began = time.perf_counter()
        count = int(files * share) // BATCH * BATCH
        manifest, broken = write_files(folder, modality, count)
        try:
            result = {"crashes": 0} | check_stream(stream_spec(modality, manifest, timeout_s=timeout_s), broken)
        except Exception as e:
            result = {"crashes": 1, "listed": 0, "wrong": [f"the stream of {modality} stopped: {e!r}"]}
        out[modality] = {"files": count, "broken": len(broken)} | result | {"s": round(time.perf_counter() - began, 1)}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=2000)
    files = parser.parse_args().files
    # Decode processes take the deadly decoders from this folder's tests/.
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
    start_ray(Cluster())
    quiet_ray_data()
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), files=files)
    totals = {key: sum(r[key] for r in result.values()) for key in ("files", "broken", "listed", "crashes")}
    wrong = [w for r in result.values() for w in r["wrong"]]
    print(json.dumps(totals | {"wrong": wrong[:20], "streams": result}, indent=1))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
