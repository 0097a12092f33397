"""A few hundred labelled pictures: from scratch, a linear probe, and fine-tuning, on the demo's encoder.

    python -m benchmarks.finetune --make labelled        writes the pictures of configs/finetune.yaml, and no more
    python -m benchmarks.finetune --demo runs/demo [--seeds 3] [--steps 300]

JSON on standard output: for every way the share of held-out pictures whose class is found, the mean over the seeds and
each of them, and the seconds of a step. The pictures show sixteen emoji of animals as the demo never shows them:
turned, smaller, anywhere, on coloured and noisy ground. The probe is scikit-learn's logistic regression on pooled
features.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks import bare, timing
from pipeline.cli import main as imp
from pipeline.data import demo
from pipeline.evaluate.measure import evaluate_run
from pipeline.export import load
from pipeline.recipe.yaml_text import read_yaml

ROOT = Path(__file__).resolve().parents[1]
# Name of an emoji → its code point, which names its drawing in the demo's corpus.
ANIMALS = {
    "mouse": "1F42D",
    "cow": "1F42E",
    "tiger": "1F42F",
    "rabbit": "1F430",
    "cat": "1F431",
    "dragon": "1F432",
    "horse": "1F434",
    "monkey": "1F435",
    "dog": "1F436",
    "pig": "1F437",
    "frog": "1F438",
    "hamster": "1F439",
    "wolf": "1F43A",
    "bear": "1F43B",
    "panda": "1F43C",
    "fox": "1F98A",
}
TRAIN, HELD_OUT = 20, 40
SIDE, GROUND = 128, 160
# Way → changes of the recipe's sections.
_ONE_RATE: dict = {"learning_rate_scales": {}}
WAYS: dict[str, dict] = {
    "from scratch": {"init": {"from": None}},
    "from scratch, one rate": {"init": {"from": None}, "train": _ONE_RATE},
    "classifier on the frozen encoder": {"train": {"freeze": ["encoder", "embed"]}},
    "classifier on the frozen encoder, one rate": {"train": {"freeze": ["encoder", "embed"]} | _ONE_RATE},
    "fine-tuned": {},
    "fine-tuned, one rate": {"train": _ONE_RATE},
    "fine-tuned, encoder at 0.3 of the rate": {"train": {"learning_rate_scales": {"encoder": 0.3, "embed": 0.3}}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", type=Path, metavar="FOLDER", help="write the labelled pictures and end")
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="a finished run of the demo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    if args.make:
        return make(args.make)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        make(data)
        found = {name: _over_seeds(name, recipe(data, args), args.seeds) for name in WAYS}
        found["linear probe"] = {"accuracy": probe(data, args.demo, Path(folder) / "exported")}
        timing.show({"machine": timing.machine(), "pictures": TRAIN * len(ANIMALS), "ways": found})


def recipe(data: Path, args: argparse.Namespace) -> dict:
    """configs/finetune.yaml with the folders of this machine."""
    raw = read_yaml((ROOT / "configs" / "finetune.yaml").read_text(encoding="utf-8"))
    pictures = {"manifest": str(data / "train.parquet"), "held_out": str(data / "held_out.parquet")}
    raw["data_sets"]["animals"] |= pictures
    raw["init"] = {"from": str(args.demo)}
    raw["train"] |= {"num_steps": args.steps} if args.steps else {}
    return raw


def _over_seeds(name: str, raw: dict, seeds: int) -> dict:
    accuracies, seconds = [], []
    for seed in range(seeds):
        changed = copy.deepcopy(raw) | {"seed": seed}
        for section, values in WAYS[name].items():
            changed[section] = changed[section] | values
        with bare.trained(changed) as (model, _, folder):
            (entry,) = evaluate_run(folder, model)
            steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        accuracies.append(entry["metrics"]["acc1"])
        seconds.append(statistics.median(step["step_s"] for step in steps[len(steps) // 4 :]))
    timing.say(f"{name}: {accuracies}")
    mean = {"accuracy": statistics.mean(accuracies), "step_s": statistics.mean(seconds)}
    return mean | {"seeds": accuracies}


def probe(data: Path, run_dir: Path, exported: Path) -> float:
    """Logistic regression on the demo's features; its regularisation is chosen by five folds of the training part."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    with contextlib.redirect_stdout(io.StringIO()):  # standard output is the benchmark's
        code = imp(["export", "--run", str(run_dir), "--out", str(exported)])
    if code:
        raise SystemExit(code)
    encoder, parts = load(exported), {}
    for part in ("train", "held_out"):
        rows = pq.read_table(data / f"{part}.parquet").to_pylist()
        paths = [str(data / row["image"]) for row in rows]
        features = encoder.embed(images=paths, space="features", data_set="emoji", size=64)["images"]
        parts[part] = features, [row["labels"][0] for row in rows]
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    model = GridSearchCV(regression, {"logisticregression__C": np.logspace(-4, 2, 7)}, cv=5)
    return float(model.fit(*parts["train"]).score(*parts["held_out"]))


def make(folder: Path) -> None:
    """Writes the pictures and their two manifests."""
    corpus = demo.build(demo.cache_dir())
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for part, first, count in (("train", 0, TRAIN), ("held_out", TRAIN, HELD_OUT)):
        rows = []
        for name, points in ANIMALS.items():
            drawing = Image.open(corpus / "emoji" / "images" / f"{points}.png").convert("RGB")
            for number in range(first, first + count):
                path = f"images/{name}-{number}.png"
                scene(drawing, np.random.default_rng([int(points, 16), number])).save(folder / path)
                rows.append({"id": f"{name}-{number}", "image": path, "labels": [name]})
        np.random.default_rng(0).shuffle(rows)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{part}.parquet")


def scene(drawing: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The drawing without its grey ground, turned and smaller, somewhere on a noisy ground of some colour."""
    pixels = np.asarray(drawing)
    shown = Image.fromarray(np.where((pixels == GROUND).all(-1), 0, 255).astype(np.uint8))
    size, angle = int(SIDE * rng.uniform(0.45, 0.95)), rng.uniform(-40, 40)
    small, mask = (x.rotate(angle, Image.Resampling.BILINEAR).resize((size, size)) for x in (drawing, shown))
    noise = rng.normal(rng.uniform(40, 216, 3), rng.uniform(4, 40), (SIDE, SIDE, 3))
    out = Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8))
    out.paste(small, tuple(int(v) for v in rng.integers(0, SIDE - size + 1, 2)), mask)
    return out


if __name__ == "__main__":
    main()
