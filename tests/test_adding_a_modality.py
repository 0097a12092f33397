"""Depth maps as PNG, added by following docs/adding-a-modality.md alone: its blocks are all there is of them.

Without Ray: from the files through the decode process, tokens and batches to steps, a checkpoint and an evaluation.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import recipe as recipes

TESTS = Path(__file__).resolve().parent


def load(path: Path):
    """A module of the tests."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def rooms(tmp_path, monkeypatch) -> Path:
    """A folder with the page's decoder, data set and recipe. Returns the recipe's path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("IMP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, "depth", raising=False)
    for block in load(TESTS / "test_docs.py").blocks("docs/adding-a-modality.md"):
        if "file" in block.marks:
            Path(block.marks["file"]).write_text(block.text)
        elif block.language == "python":
            exec(block.text, {})
    return tmp_path / "rooms.yaml"


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
def test_depth_maps_train_and_evaluate(rooms):
    from pipeline.evaluate.measure import evaluate_run

    recipe = recipes.load(rooms, [f"cluster.compile_cache={rooms.parent}"])
    summary = load(TESTS / "pipeline/train/bare_run.py").run(recipe, rooms.parent / "run")
    assert summary["steps"] == 40 and summary["rejects"]["rooms"]["rejected"] == 0
    results = {result["task"]: result["metrics"]["acc1"] for result in evaluate_run(rooms.parent / "run")}
    assert results["classify_image"] == results["zero_shot_image"] == 1.0
