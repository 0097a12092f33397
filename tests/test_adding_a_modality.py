"""Depth maps as PNG, added by following docs/adding-a-modality.md alone: its blocks are all there is of them.

Without Ray: from the files through the decode process, tokens and batches to steps, a checkpoint and an evaluation.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.doc_blocks import blocks, edited

TESTS = Path(__file__).resolve().parent
PAGE = blocks("docs/adding-a-modality.md")
# Trains the recipe in its first argument into the folder in its second, and prints what was measured.
TRAIN = """
import json, pathlib, sys
import bare_run
from pipeline import recipe as recipes
from pipeline.evaluate.measure import evaluate_run

run_dir = pathlib.Path(sys.argv[2])
summary = bare_run.run(recipes.load(pathlib.Path(sys.argv[1])), run_dir)
results = {result["task"]: result["metrics"]["acc1"] for result in evaluate_run(run_dir)}
print(json.dumps([summary["steps"], summary["rejects"]["rooms"]["rejected"], results]))
"""


@pytest.fixture
def rooms(tmp_path, monkeypatch) -> Path:
    """A folder with the page's decoder, data set and recipes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "depth", raising=False)
    for block in PAGE:
        if "file" in block.marks:
            Path(block.marks["file"]).write_text(block.text)
        elif block.language == "python":
            exec(block.text, {})
    return tmp_path


def train(recipe: str, folder: Path, *, product: Path, flags: str) -> list:
    """[steps, rejected samples, {measurement: accuracy}] of a run, in a process of its own."""
    paths = os.pathsep.join(map(str, (product, folder, TESTS / "pipeline/train")))
    env = os.environ | {"PYTHONPATH": paths, "IMP_CACHE": str(folder), "XLA_FLAGS": flags}
    command = [sys.executable, "-c", TRAIN, recipe, f"runs/{recipe}"]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_decoder_keeps_what_pillow_drops(rooms):
    import depth

    Image.fromarray(np.array([[0, 300], [5150, 10000]], np.uint16)).save("four.png")
    pixels = depth.read("four.png", None, start_s=0.0, end_s=None)
    assert pixels[..., 0].tolist() == [[0, 0], [128, 255]]  # depth
    assert pixels[..., 1].tolist() == [[0, 255], [7, 0]]  # its inverse
    assert pixels[..., 2].tolist() == [[0, 255], [255, 255]]  # measured
    Image.new("RGB", (2, 2)).save("colour.png")
    with pytest.raises(ValueError, match="16-bit"):
        depth.read("colour.png", None, start_s=0.0, end_s=None)


@pytest.mark.slow
def test_depth_maps_train_and_evaluate_as_pictures(rooms, quick_compile):
    steps, rejected, results = train("rooms.yaml", rooms, product=TESTS.parent, flags=quick_compile)
    assert (steps, rejected) == (40, 0)
    assert results == {"classify_image": 1.0, "zero_shot_image": 1.0}


@pytest.mark.slow
def test_depth_is_a_modality_after_six_lines(rooms, quick_compile):
    """In a copy of the product with the page's edits."""
    for name in ("model", "pipeline"):
        shutil.copytree(TESTS.parent / name, rooms / "product" / name, ignore=shutil.ignore_patterns("__pycache__"))
    (diff,) = [block.text for block in PAGE if block.language == "diff"]
    for name, text in edited(diff, rooms / "product").items():
        (rooms / "product" / name).write_text(text)
    steps, rejected, results = train("both.yaml", rooms, product=rooms / "product", flags=quick_compile)
    assert (steps, rejected) == (40, 0)
    assert results == {"classify_depth": 1.0}
