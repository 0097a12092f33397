"""A set sorted by class against the same set shuffled: learning must not depend on a manifest's order. JSON.

    python -m benchmarks.sorted_data [--quick]

Handwritten digits (scikit-learn's, each shown many times at another place and size) as one tar and two manifests:
sorted by class, as an import of class folders leaves them, and shuffled. A tiny model learns to classify them for some
hundred steps, for each of several seeds. accuracy: on digits that are not in the tar. gap: mean of the sorted runs less
that of the shuffled ones, in percentage points; spread: standard deviation over the seeds, both orders together. jumps:
the largest loss over the median in the second half of the steps; a set learned class by class jumps at each of them.
"""

from __future__ import annotations

import io
import json
import statistics
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks import bare, timing
from pipeline.data.media.storage import member_path
from pipeline.evaluate.measure import evaluate_run

SIZES = {
    "quick": {"rows": 2000, "steps": 10, "seeds": 1},
    # Larger than 8,192 rows several times over, and one visit of each.
    "cpu": {"rows": 40_000, "steps": 600, "seeds": 3},
}
SIDE, BATCH = 28, 64
# Digits that are not in the tar.
HELD_OUT = 297


def digits(count: int, *, held_out: bool) -> list[tuple[str, bytes]]:
    """(class, PNG) of each digit, shown as often as it takes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    kept = slice(-HELD_OUT, None) if held_out else slice(0, -HELD_OUT)
    images, labels = data.images[kept] * (255 / 16), data.target[kept]
    draw, out = np.random.default_rng(held_out), []
    for number in range(count):
        size = int(draw.integers(16, 25))
        picture = Image.new("L", (SIDE, SIDE))
        small = Image.fromarray(images[number % len(images)].astype(np.uint8)).resize((size, size))
        picture.paste(small, tuple(draw.integers(0, SIDE - size + 1, 2)))
        content = io.BytesIO()
        picture.save(content, "png")
        out.append((str(labels[number % len(images)]), content.getvalue()))
    return out


def write(folder: Path, name: str, found: list[tuple[str, bytes]]) -> list[dict]:
    """One tar of all files; the rows that name them, in its order."""
    path, rows = folder / f"{name}.tar", []
    with tarfile.open(path, "w") as tar:
        for number, (label, content) in enumerate(found):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = len(content)
            offset = tar.offset + tarfile.BLOCKSIZE
            tar.addfile(member, io.BytesIO(content))
            image = member_path(path.name, offset, len(content))
            rows.append({"id": f"{name}-{number}", "image": image, "labels": [label]})
    return rows


def write_manifests(folder: Path, num_rows: int) -> dict[str, Path]:
    by_class = sorted(digits(num_rows, held_out=False), key=lambda d: d[0])
    rows = write(folder, "train", by_class)
    shuffled = np.random.default_rng(0).permutation(num_rows)
    held_out = write(folder, "held_out", digits(HELD_OUT, held_out=True))
    tables = {"sorted": rows, "shuffled": [rows[i] for i in shuffled], "held_out": held_out}
    paths = {name: folder / f"{name}.parquet" for name in tables}
    for name, table in tables.items():
        pq.write_table(pa.Table.from_pylist(table), paths[name])
    return paths


def learn(manifest: Path, held_out: Path, *, seed: int, steps: int) -> dict:
    data_set = {"manifest": str(manifest), "held_out": str(held_out), "classes": [str(i) for i in range(10)]}
    task = {"data_set": "digits", "objective": "softmax", "modalities": ["image"], "batch_size": BATCH}
    recipe = {
        "seed": seed,
        "model": {"variant": "imp-tiny"},
        "data_sets": {"digits": data_set | {"image": {"short_side": 32}}},
        "tasks": {"classes": task | {"variants": [{"size": 32}]}},
        "train": {"num_steps": steps, "checkpoint_every": 1_000_000, "learning_rate": 1e-3},
        "evaluate": [{"data_set": "digits", "kind": "classify", "modality": "image"}],
    }
    with bare.trained(recipe) as (_, _, folder):
        losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        (found,) = evaluate_run(folder)
    late = losses[len(losses) // 2 :]
    return {"accuracy": found["metrics"]["acc1"], "jumps": max(late) / statistics.median(late)}


def main() -> None:
    sizes = SIZES["quick" if timing.arguments(__doc__).quick else "cpu"]
    found: dict[str, list[dict]] = {"sorted": [], "shuffled": []}
    with tempfile.TemporaryDirectory() as folder:
        paths = write_manifests(Path(folder), sizes["rows"])
        for seed in range(sizes["seeds"]):
            for order, results in found.items():
                results.append(learn(paths[order], paths["held_out"], seed=seed, steps=sizes["steps"]))
                timing.say(f"seed {seed}, {order}: {results[-1]}")
    accuracy = {order: [100 * r["accuracy"] for r in results] for order, results in found.items()}
    means = {order: statistics.mean(values) for order, values in accuracy.items()}
    deviations = [a - means[order] for order, values in accuracy.items() for a in values]
    result = {
        "accuracy, %": accuracy,
        "gap": means["sorted"] - means["shuffled"],
        "spread": float(np.std(deviations, ddof=1)) if len(deviations) > 2 else None,
        "jumps": {order: max(r["jumps"] for r in results) for order, results in found.items()},
    }
    timing.show({"machine": timing.machine(), "sizes": sizes, **result})


if __name__ == "__main__":
    main()
