"""Drum hits of kits that were not trained on, with and without the augmentation of sounds.

    python -m benchmarks.sounds [--runs none,masks] [--seeds 3] [--steps 400]

JSON on standard output: for every run the share of hits whose class is found, of kits that were trained on (``same``)
and of others (``unseen``), the mean over the seeds and each of them. The hits are synthesised: a kit has its own
pitches, decays, filters and loudness, and its hits differ a little.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from scipy.signal import lfilter

from benchmarks import bare, timing
from pipeline.evaluate.measure import evaluate_run

RATE_HZ, SECONDS = 16_000, 0.8
# Class → (pitch in Hz or None for noise alone, where it falls to, decay in s, share of noise, low cut of the noise).
CLASSES = {
    "kick": (60, 0.5, 0.20, 0.05, 0.0),
    "low tom": (95, 0.8, 0.30, 0.05, 0.0),
    "high tom": (160, 0.8, 0.22, 0.05, 0.0),
    "snare": (190, 0.9, 0.14, 0.6, 0.5),
    "clap": (None, 1.0, 0.12, 1.0, 0.7),
    "closed hat": (None, 1.0, 0.04, 1.0, 0.95),
    "open hat": (None, 1.0, 0.30, 1.0, 0.95),
    "cowbell": (560, 1.0, 0.18, 0.02, 0.0),
}
TRAINED_KITS, UNSEEN_KITS = range(4), range(100, 108)
HITS = 13
SOUND = {
    "none": {},
    "gain": {"gain_db": [-12.0, 12.0]},
    "masks": {"time_masks": 1, "mel_masks": 1},
    "noise": {"noise_probability": 0.5},
    "gain, masks": {"gain_db": [-12.0, 12.0], "time_masks": 1, "mel_masks": 1},
    "all": {"gain_db": [-12.0, 12.0], "time_masks": 1, "mel_masks": 1, "noise_probability": 0.5},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default=";".join(SOUND), help="names, with ; between them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    result = {"machine": timing.machine(), "steps": args.steps, "runs": {}}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        write(data, "train", TRAINED_KITS, first_hit=0)
        write(data, "same", TRAINED_KITS, first_hit=HITS)
        write(data, "unseen", UNSEEN_KITS, first_hit=0)
        for run in args.runs.split(";"):
            found = [accuracy(recipe(data, SOUND[run], seed=seed, steps=args.steps)) for seed in range(args.seeds)]
            result["runs"][run] = {part: _with_mean([one[part] for one in found]) for part in found[0]}
            timing.say(f"{run}: {result['runs'][run]}")
    timing.show(result)


def _with_mean(values: list[float]) -> dict:
    return {"mean": statistics.mean(values), "seeds": values}


def write(data: Path, name: str, kits: range, *, first_hit: int) -> None:
    rows = []
    for kit in kits:
        for number, label in enumerate(CLASSES):
            for hit in range(first_hit, first_hit + HITS):
                path = f"{kit}-{number}-{hit}.wav"
                soundfile.write(data / path, drum(label, kit=kit, seed=(kit, number, hit)), RATE_HZ)
                rows.append({"id": path, "audio": path, "labels": [label]})
    np.random.default_rng(0).shuffle(rows)
    pq.write_table(pa.Table.from_pylist(rows), data / f"{name}.parquet")


def drum(label: str, *, kit: int, seed: tuple[int, ...]) -> np.ndarray:
    """One hit, (samples,) float32."""
    pitch, fall, decay, noisy, cut = CLASSES[label]
    # Draws of the whole kit, of this drum of the kit, and of this hit.
    common, own, rng = (np.random.default_rng([3, *key]) for key in ((kit,), seed[:2], seed))
    time = np.arange(int(RATE_HZ * SECONDS)) / RATE_HZ
    decay *= np.exp(common.normal(0, 0.35) + own.normal(0, 0.2) + rng.normal(0, 0.05))
    noise = lfilter([1.0, -cut], [1.0], rng.standard_normal(len(time)))
    wave = noise * np.exp(-time / decay) * noisy
    if pitch:
        pitch *= np.exp(common.normal(0, 0.25) + own.normal(0, 0.12) + rng.normal(0, 0.02))
        sweep = fall + (1 - fall) * np.exp(-time / 0.05)
        phase = 2 * np.pi * np.cumsum(pitch * sweep) / RATE_HZ
        drive = common.uniform(1, 4)
        wave += (1 - noisy) * np.tanh(drive * np.sin(phase)) / np.tanh(drive) * np.exp(-time / decay)
    # The room and the microphone.
    pole = common.uniform(-0.5, 0.8)
    wave = lfilter([1 - abs(pole)], [1.0, -pole], wave)
    level = common.uniform(-25, -3) + rng.normal(0, 1.5)
    wave *= 10 ** (level / 20) / np.abs(wave).max()
    hiss = rng.standard_normal(len(time)) * 10 ** (common.uniform(-70, -45) / 20)
    return (wave + hiss).astype(np.float32)


def recipe(data: Path, sound: dict, *, seed: int, steps: int) -> dict:
    held_out = {part: str(data / f"{part}.parquet") for part in ("same", "unseen")}
    audio = {"frame_length": 512, "hop_length": 256, "num_frames": 48, "num_mels": 64, "mean": -6.0, "std": 4.0}
    entry = {"data_set": "drums", "kind": "classify", "modality": "audio"}
    return {
        "seed": seed,
        "data_sets": {
            "drums": {
                "manifest": str(data / "train.parquet"),
                "held_out": held_out,
                "classes": list(CLASSES),
                "audio": audio,
            }
        },
        "tasks": {
            "hits": {
                "data_set": "drums",
                "objective": "softmax",
                "modalities": ["audio"],
                "batch_size": 48,
                "augment": {"sound": sound},
            }
        },
        "train": {"num_steps": steps, "checkpoint_every": 1_000_000},
        "evaluate": [entry | {"held_out": part} for part in held_out],
    }


def accuracy(raw: dict) -> dict[str, float]:
    with bare.trained(raw) as (model, _, folder):
        entries = evaluate_run(folder, model)
    return {entry["dataset"].partition("/")[2]: entry["metrics"]["acc1"] for entry in entries}


if __name__ == "__main__":
    main()
