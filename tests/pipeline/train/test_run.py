"""The loop without Ray: a run that is killed and run again equals one that was left alone, bit for bit."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipeline import recipe as recipes

BARE_RUN = Path(__file__).with_name("bare_run.py")
ROOT = Path(__file__).resolve().parents[3]


def _load_bare_run():
    spec = importlib.util.spec_from_file_location("bare_run", BARE_RUN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_jsonl(path: Path) -> list[dict]:
    lines = path.read_text().splitlines() if path.exists() else []
    out = []
    for line in lines:
        try:
            out.append(json.loads(line))
        except ValueError:
            continue
    return out


def start(recipe_path: Path, run_dir: Path, cache: Path) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)}
    return subprocess.Popen(
        [sys.executable, str(BARE_RUN), str(recipe_path), str(run_dir)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_at(process: subprocess.Popen, run_dir: Path, step: int) -> None:
    """kill -9 as soon as the metrics show the step."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        records = read_jsonl(run_dir / "metrics.jsonl")
        if records and records[-1]["step"] >= step:
            break
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[0]
    process.send_signal(signal.SIGKILL)
    process.wait()


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output


@pytest.mark.slow
def test_killed_runs_equal_the_one_left_alone(toy_recipe, tmp_path, compile_cache):
    toy_recipe["cluster"] = {"compile_cache": str(compile_cache)}
    recipe_path = tmp_path / "toy.yaml"
    recipe_path.write_text(yaml.safe_dump(toy_recipe))
    finish(start(recipe_path, tmp_path / "whole", tmp_path))
    run_dir = tmp_path / "killed"
    # Before the first checkpoint, and twice between checkpoints: from scratch, then from the newest whole one.
    for step in (3, 7, 11):
        kill_at(start(recipe_path, run_dir, tmp_path), run_dir, step)
    finish(start(recipe_path, run_dir, tmp_path))
    whole, killed = (read_jsonl(d / "metrics.jsonl") for d in (tmp_path / "whole", run_dir))
    assert [r["step"] for r in killed] == list(range(1, 15))
    exact = ("step", "task", "variant", "loss", "grad_norm", "learning_rate", "temperatures")
    assert [[r[k] for k in exact] for r in killed] == [[r[k] for k in exact] for r in whole]
    assert read_jsonl(run_dir / "samples.jsonl") == read_jsonl(tmp_path / "whole" / "samples.jsonl")
    assert_same_state(tmp_path / "whole", run_dir)


def assert_same_state(first: Path, second: Path) -> None:
    import jax
    import numpy as np

    from pipeline.evaluate.model import TrainedModel

    a, b = (TrainedModel(d).params for d in (first, second))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.slow
def test_run_directory_and_one_compile_a_structure(toy_recipe, tmp_path, compile_cache):
    bare_run = _load_bare_run()
    toy_recipe["cluster"] = {"compile_cache": str(compile_cache)}
    summary = bare_run.run(recipes.from_dict(toy_recipe), tmp_path / "run")
    # classes has two variants, image_text and video_audio one each.
    assert summary["num_structures"] == 4
    assert summary["compile_count"] <= 4
    assert summary["compile_alarms"] == 0
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    seen = {(r["task"], r["variant"]) for r in records}
    assert summary["compile_count"] == len(seen)
    assert sum(t["steps"] for t in summary["tasks"].values()) == 14
    by_task = {name: sum(r["task"] == name for r in records) for name in summary["tasks"]}
    assert by_task == {name: t["steps"] for name, t in summary["tasks"].items()}
    # 16 px: 1 token x 8; 32 px: 4 tokens x 2: the same vision tokens a step.
    classes = [s for s in summary["structures"] if s["task"] == "classes"]
    assert {s["vision_tokens"] for s in classes} == {8}


@pytest.mark.slow
def test_stop_saves_and_goes_on(toy_recipe, tmp_path, compile_cache):
    bare_run = _load_bare_run()
    toy_recipe["cluster"] = {"compile_cache": str(compile_cache)}
    recipe = recipes.from_dict(toy_recipe)
    asked = iter(range(100))
    summary = bare_run.run(recipe, tmp_path / "run", should_stop=lambda: next(asked) >= 7)
    assert summary["steps"] == 7
    summary = bare_run.run(recipe, tmp_path / "run")
    assert (summary["start_step"], summary["steps"]) == (7, 14)
    assert [r["step"] for r in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 15))
