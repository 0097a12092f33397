"""Depth maps as PNG, added by following docs/adding-a-modality.md alone: its blocks are all there is of them.

Without Ray: from the files through the decode process, tokens and batches to steps, a checkpoint and an evaluation.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.doc_blocks import blocks

TESTS = Path(__file__).resolve().parent
# Trains the page's recipe, and prints what was measured.
TRAIN = """
import json, pathlib
import bare_run
from pipeline import recipe as recipes
from pipeline.evaluate.measure import evaluate_run

summary = bare_run.run(recipes.load(pathlib.Path("rooms.yaml")), pathlib.Path("run"))
results = {result["task"]: next(iter(result["metrics"].items())) for result in evaluate_run(pathlib.Path("run"))}
print(json.dumps([summary["steps"], summary["rejects"]["rooms"]["rejected"], results]))
"""


@pytest.fixture
def rooms(tmp_path, monkeypatch) -> Path:
    """A folder with the page's module, data set and recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "depth", raising=False)
    for block in blocks("docs/adding-a-modality.md"):
        if "file" in block.marks:
            Path(block.marks["file"]).write_text(block.text)
        elif block.language == "python":
            exec(block.text, {})
    return tmp_path


def test_depth_becomes_patches_with_positions(rooms):
    import depth

    spec = depth.DepthSpec(size=16, max_m=4.0)
    Image.fromarray(np.repeat(np.array([[0, 1000], [2000, 9000]], np.uint16), 8, 0).repeat(8, 1)).save("four.png")
    found = depth.tokens(depth.decode("four.png", spec, None), spec, None)
    assert found.tokens.shape == (depth.num_tokens(spec), 64) and found.tokens.dtype == np.float32
    assert (found.tokens == [[0], [0.25], [0.5], [1]]).all()
    assert found.positions.tolist() == [[0, 0], [0, 8], [8, 0], [8, 8]]
    Image.new("RGB", (2, 2)).save("colour.png")
    with pytest.raises(ValueError, match="16-bit"):
        depth.decode("colour.png", spec, None)


@pytest.mark.slow
def test_depth_maps_train_and_evaluate(rooms):
    paths = os.pathsep.join(map(str, (TESTS.parent, rooms, TESTS / "pipeline/train")))
    env = os.environ | {"PYTHONPATH": paths, "IMP_CACHE": str(rooms)}
    command = [sys.executable, "-c", TRAIN]
    done = subprocess.run(command, env=env, cwd=rooms, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    steps, rejected, results = json.loads(done.stdout.splitlines()[-1])
    assert (steps, rejected) == (60, 0)
    assert results.pop("retrieval_depth_image") == ["depth_image_retrieval_recall@1", 1.0]
    assert results == {"classify_depth": ["acc1", 1.0], "zero_shot_depth": ["acc1", 1.0]}
