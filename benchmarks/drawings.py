"""Drawings of the same things in several styles: the settings with which a model names those of an unseen style.

    npm install --ignore-scripts @iconify-json/{openmoji,noto,noto-v1,twemoji,fluent-emoji-flat,emojione,emojione-v1}
    python -m benchmarks.drawings --icons node_modules/@iconify-json [--runs base,jitter] [--steps 600] [--quick]

JSON on standard output. For every run the share of drawings whose own name is the nearest of all names: of the style
that was held out (``unseen``) and of as many training drawings (``seen``); ``by drawing``: the share of the unseen
style whose nearest training drawing has its name; ``pixels``: the same by pixels in place of features. Curves and what
follows from them: docs/decisions/small-runs-that-learn.md.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import statistics
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks import bare, timing
from pipeline.data.batches import SampleMaker
from pipeline.data.plan import group_arrays
from pipeline.data.sample_tokens import View
from pipeline.data.sources import MediaSource
from pipeline.data.tokenizer import encode_text

STYLES = ("openmoji", "noto", "noto-v1", "fluent-emoji-flat", "emojione", "emojione-v1")
UNSEEN = "twemoji"
SIDE, GROUND = 128, "#a0a0a0"
# Minimum number of training styles that draw a name for it to count.
_MIN_STYLES = 3

BASE = {
    "model": {"variant": "imp-tiny-moe", "temperature_init": 0.1},
    "text": {"vocab_size": 1000},
    "data_sets": {"drawings": {"image": {"short_side": SIDE}}},
    "tasks": {
        "names": {
            "data_set": "drawings",
            "objective": "nce",
            "modalities": ["image", "text"],
            "batch_size": 128,
            "text_length": 12,
            "variants": [{"size": 64}],
            "augment": {"area": [0.8, 1.0]},
        }
    },
    "train": {
        "learning_rate": 5e-4,
        "clip_norm": 0.1,
        "patch_learning_rate_scale": 0.1,
        "checkpoint_every": 1_000_000,
    },
}
# Defaults of a recipe at a batch of 65,536.
PAPER = {
    "model.temperature_init": 1.0,
    "train.learning_rate": 1e-3,
    "train.clip_norm": 1.0,
    "train.patch_learning_rate_scale": 1.0,
}
# Run → its changes: "." separates levels; the task's own keys come without "tasks.names".
RUNS: dict[str, dict] = {
    "base": {},
    "jitter": {"augment.colour": {"probability": 0.8}},
    "crops": {"augment.area": [0.3, 1.0], "augment.aspect": [0.75, 1.33]},
    "96px": {"variants": [{"size": 96}]},
    "128px": {"variants": [{"size": 128}]},
    "batch512": {"batch_size": 512, "steps": 0.25},
    "batch512_equal_steps": {"batch_size": 512},
    "steps9_all": {"steps": 9, "augment.colour": {"probability": 0.8}, "augment.area": [0.3, 1.0]},
    "steps3_all": {"steps": 3, "augment.colour": {"probability": 0.8}, "augment.area": [0.3, 1.0]},
    "small": {"model.variant": "imp-s-moe"},
    "steps3": {"steps": 3},
    "classes": {"objective": {"nce": 1.0, "softmax": 1.0}},
    "dense": {"model.variant": "imp-tiny"},
    "lr2": {"train.learning_rate": 1e-3},
    "lr4": {"train.learning_rate": 2e-3},
    "large_batch_values": PAPER,
    "temperature": PAPER | {"model.temperature_init": 0.1},
    "unclipped": {"train.clip_norm": 1.0},
    "patches": {"train.patch_learning_rate_scale": 1.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--icons", type=Path, required=True, help="folder of the @iconify-json packages")
    parser.add_argument("--data", type=Path, default=Path("data/drawings"), help="where drawings are rendered to")
    parser.add_argument("--names", type=int, default=1500, help="number of names")
    parser.add_argument("--steps", type=int, default=600, help="steps of the base run")
    parser.add_argument("--runs", default="base", help=f"some of {','.join(RUNS)}; a+b joins two")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="60 names, 4 steps: whether it runs")
    args = parser.parse_args()
    if args.quick:
        args.names, args.steps = 60, 4
        args.data /= "quick"
    names = build(args.icons, args.data, count=args.names)
    result = {"machine": timing.machine(), "names": len(names), "rows": rows_of(args.data / "train.parquet")}
    result["pixels"] = {f"{side}px": nearest_pixels(args.data, side=side) for side in (16, 32)}
    timing.say(json.dumps(result))
    result["runs"] = {}
    for run in args.runs.split(","):
        result["runs"][run] = measure(recipe(run, args), names)
        timing.say(f"{run}: {json.dumps(result['runs'][run])}")
    timing.show(result)


# --- the drawings ---


def build(icons: Path, data: Path, *, count: int) -> list[str]:
    """Renders the drawings of ``count`` names and writes train.parquet and unseen.parquet. Returns the names."""
    sets = {style: json.loads((icons / style / "icons.json").read_text()) for style in (*STYLES, UNSEEN)}
    drawn = {slug: [s for s in STYLES if slug in sets[s]["icons"]] for slug in sets[UNSEEN]["icons"]}
    slugs = sorted((s for s, styles in drawn.items() if len(styles) >= _MIN_STYLES), key=_stable)[:count]
    for slug in slugs:
        for style in (*drawn[slug], UNSEEN):
            _render(sets[style], slug, data / style / f"{slug}.png")
    train = [_row(slug, style) for slug in slugs for style in drawn[slug]]
    # Neighbours in the table are neighbours in a batch more often than chance has it.
    _write(sorted(train, key=lambda row: _stable(row["id"])), data / "train.parquet")
    _write([_row(slug, UNSEEN) for slug in slugs], data / "unseen.parquet")
    return [_name(slug) for slug in slugs]


def _stable(text: str) -> str:
    return hashlib.blake2b(text.encode()).hexdigest()


def _name(slug: str) -> str:
    return slug.replace("-", " ")


def _row(slug: str, style: str) -> dict:
    image = f"{style}/{slug}.png"
    return {"id": f"{style}-{slug}", "image": image, "text": [_name(slug)], "labels": [_name(slug)]}


def _write(rows: list[dict], path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def _render(icons: dict, slug: str, path: Path) -> None:
    import resvg_py

    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    icon = icons["icons"][slug]
    box = [icon.get(key, icons.get(key, default)) for key, default in _BOX.items()]
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{_text(box)}">'
    svg += icon["body"] + "</svg>"
    path.write_bytes(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, background=GROUND)))


_BOX = {"left": 0, "top": 0, "width": 16, "height": 16}


def _text(box: list[float]) -> str:
    return " ".join(map(str, box))


def rows_of(path: Path) -> int:
    return pq.read_metadata(path).num_rows


# --- measurements ---


def nearest_pixels(data: Path, *, side: int) -> float:
    """Share of the unseen style's drawings whose nearest training drawing, by squared distance, has their name."""
    train, unseen = (pq.read_table(data / f"{part}.parquet").to_pylist() for part in ("train", "unseen"))
    of_train, of_unseen = (_pixels(data, rows, side) for rows in (train, unseen))
    squares = (of_train**2).sum(1)
    nearest = [int(np.argmin(squares - 2 * (of_train @ one))) for one in of_unseen]
    return float(np.mean([train[n]["text"] == row["text"] for n, row in zip(nearest, unseen, strict=True)]))


def _pixels(data: Path, rows: list[dict], side: int) -> np.ndarray:
    def one(path: str) -> np.ndarray:
        image = Image.open(data / path).convert("RGB").resize((side, side), Image.Resampling.BOX)
        return np.asarray(image, np.float32).ravel() / 255

    return np.stack([one(row["image"]) for row in rows])


def recipe(run: str, args) -> dict:
    """The base recipe with the changes of every part of the run's name."""
    raw, steps = copy.deepcopy(BASE), args.steps
    changes = {key: value for part in run.split("+") for key, value in RUNS[part].items()}
    for key, value in changes.items():
        if key == "steps":
            steps = round(steps * value)
            continue
        node = raw if key.startswith(("model.", "train.")) else raw["tasks"]["names"]
        *outer, last = key.split(".")
        for part in outer:
            node = node.setdefault(part, {})
        node[last] = value
    data_set = raw["data_sets"]["drawings"]
    data_set |= {part: str((args.data / f"{p}.parquet").absolute()) for part, p in _PARTS.items()}
    if "softmax" in raw["tasks"]["names"]["objective"]:
        labels = pq.read_table(data_set["manifest"])["labels"].to_pylist()
        data_set["classes"] = sorted({name for row in labels for name in row})
    raw["train"]["num_steps"] = steps
    return raw | {"seed": args.seed}


_PARTS = {"manifest": "train", "held_out": "unseen"}


def measure(raw: dict, names: list[str]) -> dict:
    began = time.perf_counter()
    with bare.trained(raw) as (model, summary, folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        task, data_set = model.tasks["names"], model.data_sets["drawings"]
        samples = SampleMaker(task, data_set, tokenizer=model.tokenizer, tokens=model.tokens)
        texts = _features(model, "text", [encode_text(model.tokenizer, name, task.text_length) for name in names])
        texts = _unit(model.project(texts, source="text", target="vision"))
        shares, images = {}, {}
        right = {}
        for part, manifest in (("unseen", data_set.held_out["held_out"]), ("seen", data_set.manifest)):
            arrays, right[part] = _drawings(data_set, manifest, samples, names)
            features = _features(model, "vision", arrays)
            images[part] = _unit(model.project(features, source="vision", target="text"))
            shares[part] = _shares((images[part] @ texts.T)[: len(names)], right[part][: len(names)])
        nearest = (images["unseen"] @ images["seen"].T).argmax(1)
        shares["by drawing"] = float(np.mean(np.array(right["seen"])[nearest] == right["unseen"]))
    return {
        "steps": summary["steps"],
        "loss": statistics.mean(line["loss"] for line in lines[-20:]),
        **shares,
        "train_s": summary["time"]["train_s"],
        "all_s": time.perf_counter() - began,
    }


def _drawings(data_set, manifest: str, samples: SampleMaker, names: list[str]) -> tuple[list[dict], list[int]]:
    """The arrays of every drawing of a manifest, and the numbers of their names."""
    source = MediaSource(data_set, modalities=("image",), manifest=manifest)
    arrays, right = [], []
    for row in range(source.num_rows):
        # A clip's pixels are good until a few more are decoded.
        clip = source.clip(row)
        arrays.append(samples.arrays(clip, View(samples.task.variants[0])))
        right.append(names.index(clip.text[0]))
    return arrays, right


def _features(model, modality: str, arrays: list[dict]) -> np.ndarray:
    return model.features(modality, [group_arrays(one)[modality] for one in arrays])


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _shares(similar: np.ndarray, right: list[int]) -> dict[str, float]:
    rank = (similar > similar[np.arange(len(right)), right][:, None]).sum(1)
    return {f"top{k}": float((rank < k).mean()) for k in (1, 5)}


if __name__ == "__main__":
    main()
