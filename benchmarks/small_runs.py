"""The worth of the optimiser's values for small batches: each of the demo's tasks alone, a few hundred steps.

    python -m benchmarks.small_runs [--tasks digit_text,emoji_text] [--settings small,large] [--steps 200] [--batch 64]

JSON on standard output: for every task and setting the mean loss of the last 20 steps over that of guessing (the
logarithm of the batch or of the number of classes): 1 is nothing learned.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

from benchmarks import bare, timing
from pipeline import recipe as recipes

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"model.temperature_init": 0.1, "learning_rate": 5e-4, "clip_norm": 0.1, "patch_learning_rate_scale": 0.1}
LARGE = {"model.temperature_init": 1.0, "learning_rate": 1e-3, "clip_norm": 1.0, "patch_learning_rate_scale": 1.0}
SETTINGS = {
    "small": SMALL,
    "large": LARGE,
    # One value of the large batch in place of the small one's.
    "small, temperature of large": SMALL | {"model.temperature_init": 1.0},
    "small, clipping of large": SMALL | {"clip_norm": 1.0},
    "small, patches of large": SMALL | {"patch_learning_rate_scale": 1.0},
    "small, rate of large": SMALL | {"learning_rate": 1e-3},
    # Scaled down from 65,536 by the square root.
    "small, rate by square root": SMALL | {"learning_rate": 1e-3 / 32},
    "small, warm-up 20 %": SMALL | {"warmup_fraction": 0.2},
    # The defaults of a recipe.
    "rule": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="digit_text,emoji_text,video_audio,audio_classes")
    parser.add_argument("--settings", default=";".join(SETTINGS), help="names, with ; between them")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, help="another batch than the demo's")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    result = {"machine": timing.machine(), "steps": args.steps, "loss over guessing": {}}
    for task in args.tasks.split(","):
        found = result["loss over guessing"][task] = {}
        for setting in args.settings.split(";"):
            found[setting] = loss_over_guessing(task, SETTINGS[setting], args)
            timing.say(f"{task}, {setting}: {found[setting]:.3f}")
    timing.show(result)


def loss_over_guessing(task: str, values: dict, args) -> float:
    raw = recipes.read_yaml((ROOT / "configs" / "demo.yaml").read_text(encoding="utf-8"))
    settings = raw["tasks"][task]
    # One input size: another would take a part of the few steps.
    settings["variants"] = settings.get("variants", [])[:1]
    settings["batch_size"] = args.batch or settings["batch_size"]
    raw |= {"tasks": {task: settings}, "evaluate": [], "seed": args.seed}
    raw["data_sets"] = {settings["data_set"]: raw["data_sets"][settings["data_set"]]}
    raw["train"] |= {"num_steps": args.steps, "checkpoint_every": 1_000_000}
    for key, value in values.items():
        raw["model" if key.startswith("model.") else "train"][key.removeprefix("model.")] = value
    with bare.trained(raw) as (model, _, folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        spec = model.tasks[task]
        classes = spec.classes or model.data_sets[spec.data_set].classes
        guess = spec.variants[0].global_batch_size if spec.contrasts else len(classes)
    return statistics.mean(line["loss"] for line in lines[-20:]) / math.log(guess)


if __name__ == "__main__":
    main()
