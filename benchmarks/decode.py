"""The cost of the full stream over decoding alone, and of one decoder over the other. JSON on standard output.

    python -m benchmarks.decode [--quick] [--blocks]

stream: CPU seconds of all processes (Ray's, the decoders', this one) over those of the same function called bare, in
this process and without a decode process; the wall-clock ratio beside it (bare over stream: 1 is as fast).
blocks: the same for blocks that are made in this process and its decode process, without Ray; alone with --blocks.
decoders: CPU milliseconds a clip on the same files. memory: growth of the decode process over 2,000 clips, after 2,000.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# As in decode processes, for a fair comparison.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

import numpy as np
import psutil

from benchmarks.family_cpu import family_cpu_s, settle
from benchmarks.media import write_image, write_manifest, write_sound, write_video
from benchmarks.one_stream import rows_of
from pipeline.cluster.spec import Cluster
from pipeline.cluster.start import quiet_ray_data, start_ray
from pipeline.data.blocks import Block, make_block
from pipeline.data.known_rejects import NONE_KNOWN
from pipeline.data.manifest import Manifest
from pipeline.data.media.clip import decode_media
from pipeline.data.media.container import frames, open_container
from pipeline.data.media.process import DecodeLimits, DecodeProcess
from pipeline.data.media.video import decode_video
from pipeline.data.spec import AudioSpec, DataSetSpec, TaskSpec, TokenSpec, VideoSpec
from pipeline.data.stream_spec import StreamSpec
from pipeline.data.variants import make_variant

# Batches of a measured stream: tens of seconds of decoding, against which a stream's start is small.
BATCHES = {"video": 80, "image": 80, "audio": 24}
BATCH = {"video": 8, "image": 64, "audio": 64}


def make_media(folder: Path, rng) -> dict[str, str]:
    """Manifests by modality: videos of 2 to 10 s at 256 pixels, photos, sound of 10 s."""
    made = {
        "video": [
            write_video(folder / f"{i}.mp4", height=256, width=340, seconds=float(rng.uniform(2, 10)), seed=i)
            for i in range(24)
        ],
        "image": [write_image(folder / f"{i}.jpg", height=480, width=640, seed=i) for i in range(128)],
        "audio": [write_sound(folder / f"{i}.flac", seconds=10, seed=i) for i in range(64)],
    }
    return {
        name: write_manifest(folder / f"{name}.parquet", [{"id": p, name: p} for p in paths])
        for name, paths in made.items()
    }


def stream_spec(modality: str, manifest: str, *, batches: int) -> StreamSpec:
    variant = make_variant(
        num_frames=16 if modality == "video" else 0,
        size=256,
        drop_rate=0.0,
        base=None,
        batch_size=BATCH[modality],
        spec=TokenSpec(),
    )
    task = TaskSpec(modality, modality, (("nce", 1.0),), (modality,), (variant,), positives="instance")
    return StreamSpec(
        task=task,
        data_set=DataSetSpec(name=modality, manifest=manifest, held_out={}),
        tokens=TokenSpec(),
        tokenizer=None,
        seed=0,
        fingerprint=Manifest(manifest).fingerprint,
        start=0,
        stop=batches,
        share=1.0,
        known_bad=NONE_KNOWN,
        cache_bytes=0,
    )


class Bare:
    """Decoding in this process, as a loop without any of the rest would."""

    cpu_s = 0.0

    @staticmethod
    def decode(row: dict, data_set: DataSetSpec, modality: str, *, next_rows: object = ()) -> np.ndarray:
        return decode_media(row, data_set, modality)


def measure(work) -> tuple[float, float]:
    """(CPU seconds, seconds) of ``work()``."""
    settle()
    cpu, began = family_cpu_s(), time.perf_counter()
    work()
    return family_cpu_s() - cpu, time.perf_counter() - began


def run_bare(spec: StreamSpec) -> None:
    maker = spec.maker()
    maker.source.decoders = Bare()
    for batch in range(spec.start, spec.stop):
        maker.row(batch, rank=0, world_size=1)


def run_stream(spec: StreamSpec) -> None:
    for _ in rows_of(spec):
        pass


def stream_costs(manifests: dict[str, str], *, part: float) -> dict:
    start_ray(Cluster())
    quiet_ray_data()
    out = {}
    for modality, manifest in manifests.items():
        batches = max(8, int(part * BATCHES[modality]))
        long, short = (stream_spec(modality, manifest, batches=n) for n in (batches, batches // 4))
        # Bare before and after: the machine's speed drifts. The difference of a long and a short run leaves out the
        # start of processes and libraries.
        order = (("before", run_bare), ("stream", run_stream), ("after", run_bare))
        runs = {}
        for name, run in order:
            (short_cpu, short_s), (cpu, s) = (
                measure(functools.partial(run, short)),
                measure(functools.partial(run, long)),
            )
            runs[name] = (cpu - short_cpu, s - short_s)
        cpu, wall = (statistics.mean((runs["before"][i], runs["after"][i])) for i in (0, 1))
        samples = (batches - batches // 4) * BATCH[modality]
        out[modality] = {
            "samples": samples,
            "bare_ms_a_sample": round(1000 * cpu / samples, 2),
            "cpu_ratio": round(runs["stream"][0] / cpu, 3),
            "wall_ratio": round(wall / runs["stream"][1], 3),
        }
    return out


def block_costs(manifests: dict[str, str], *, rounds: int) -> dict:
    """CPU seconds of making blocks over those of decoding their batches bare, in turns; median of the rounds."""
    out = {}
    for modality, manifest in manifests.items():
        ratios, size = [], 3
        for number in range(rounds + 1):
            spec = stream_spec(modality, manifest, batches=1000)
            first = number * size
            part, block = (
                dataclasses.replace(spec, start=first, stop=first + size),
                Block(modality, first, first + size, 0),
            )
            before, made, after = (
                _family_cpu_s(work)
                for work in (
                    functools.partial(run_bare, part),
                    functools.partial(make_block, spec, block, world_size=1),
                    functools.partial(run_bare, part),
                )
            )
            ratios.append(2 * made / (before + after))
        # The first round starts the decode process.
        out[modality] = round(statistics.median(ratios[1:]), 3)
    return out


def _family_cpu_s(work: Callable[[], object]) -> float:
    before = family_cpu_s()
    work()
    return family_cpu_s() - before


def _without_seeking(source, spec: VideoSpec, *, start_s: float, end_s: float | None) -> np.ndarray:
    """Decodes every frame from the file's start on, as simple readers do."""
    times, out = start_s + np.arange(spec.max_frames) / spec.fps, []
    with open_container(source) as container:
        for frame in frames(container, container.streams.video[0]):
            while len(out) < len(times) and frame.time >= times[len(out)] - 1e-3:
                out.append(frame.to_ndarray(format="rgb24"))
            if len(out) == len(times):
                break
    return np.stack(out)


def decoder_costs(folder: Path, *, rounds: int) -> dict:
    """CPU milliseconds a clip of 16 frames from the start and the middle of files, interleaved medians."""
    files = {
        "256p, 10 s": (write_video(folder / "a.mp4", height=256, width=340, seconds=10, seed=1), 10),
        "720p, 10 s": (write_video(folder / "b.mp4", height=720, width=1280, seconds=10, seed=2), 10),
        "480p, 60 s, key frame every 10 s": (
            write_video(folder / "c.mp4", height=480, width=854, seconds=60, seed=3, gop=250),
            60,
        ),
    }
    names = {"pyav": "pyav", "decord": "decord", "without seeking": "benchmarks.decode:_without_seeking"}
    out = {}
    for file, (path, seconds) in files.items():
        times = {name: [] for name in names}
        for _ in range(rounds):
            for start_s in (0.0, 0.3 * seconds, 0.7 * seconds):
                for name, decoder in names.items():
                    began = time.process_time()
                    decode_video(path, VideoSpec(decoder=decoder), start_s=start_s)
                    times[name].append(1000 * (time.process_time() - began))
        out[file] = {name: round(statistics.mean(values), 1) for name, values in times.items()}
        out[file]["decord over pyav"] = round(out[file]["decord"] / out[file]["pyav"], 2)
    return out


def memory_slope(folder: Path, *, clips: int) -> dict:
    """Bytes a clip that the decode process keeps, past the first half: its heap grows to what it needs, and stays."""
    paths = [
        write_video(folder / f"m{i}.mp4", height=64, width=96, seconds=1 + i % 3, seed=i, gop=10) for i in range(20)
    ]
    sounds = [write_sound(folder / f"m{i}.flac", seconds=2, seed=i) for i in range(5)]
    decoders = DecodeProcess(DecodeLimits())
    data_set = DataSetSpec(
        name="", manifest="", held_out={}, video=VideoSpec(short_side=64), audio=AudioSpec(num_frames=32)
    )
    rss = []
    for number in range(clips):
        decoders.decode({"video": paths[number % len(paths)]}, data_set, "video")
        decoders.decode({"audio": sounds[number % len(sounds)]}, data_set, "audio")
        rss.append(psutil.Process(decoders._child.pid).memory_info().rss)
    decoders.close()
    parts = np.array_split(np.asarray(rss, float), 8)[4:]
    slopes = [float(np.polyfit(np.arange(len(part)), part, 1)[0]) for part in parts]
    return {
        "clips": clips,
        "rss_mb_by_eighth": [round(float(part[-1]) / 1e6, 2) for part in np.array_split(rss, 8)],
        "slope_bytes_a_clip": round(statistics.mean(slopes), 1),
        "standard_error": round(statistics.stdev(slopes) / len(slopes) ** 0.5, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a fraction of the work, for a look")
    parser.add_argument("--blocks", action="store_true", help="the blocks alone")
    arguments = parser.parse_args()
    quick = arguments.quick
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifests = make_media(folder, np.random.default_rng(0))
        blocks = {"cpus": os.cpu_count(), "blocks": block_costs(manifests, rounds=3 if quick else 8)}
        if arguments.blocks:
            print(json.dumps(blocks, indent=1))
            return
        result = blocks | {
            "stream": stream_costs(manifests, part=0.1 if quick else 1.0),
            "decoders": decoder_costs(folder, rounds=1 if quick else 4),
            "memory": memory_slope(folder, clips=200 if quick else 4000),
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
