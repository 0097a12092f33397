"""``imp export --linear-probe``: a classifier that the run did not train, fitted on labelled rows."""

import shutil

import numpy as np
import pytest
from PIL import Image

from pipeline.cli import main
from pipeline.evaluate import probes
from pipeline.evaluate.trained_model import TrainedModel
from pipeline.export import load

SHADES = {"black": 10, "grey": 120, "white": 240}


@pytest.fixture(scope="module")
def shades(tmp_path_factory, write_manifest):
    """Pictures of three shades, each with a little noise of its own; the manifest, and the files by shade."""
    folder, rng, rows = tmp_path_factory.mktemp("shades"), np.random.default_rng(0), []
    for number in range(24):
        name, level = list(SHADES.items())[number % 3]
        pixels = np.clip(level + rng.integers(-8, 8, (64, 64, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append({"id": str(number), "image": f"{number}.png", "labels": [name]})
    return write_manifest(folder / "shades.parquet", rows), [(folder / r["image"], r["labels"][0]) for r in rows]


def export(toy_run, out, manifest, *more: str) -> int:
    return main(["export", "--run", str(toy_run), "--out", str(out), "--linear-probe", str(manifest), *more])


@pytest.mark.slow
def test_an_export_gives_the_answers_of_the_probe(toy_run, tmp_path, shades):
    manifest, files = shades
    assert export(toy_run, tmp_path / "out", manifest, "--data-set", "digits") == 0
    encoder = load(tmp_path / "out", verify=True)
    paths, labels = [path for path, _ in files], [label for _, label in files]
    found = encoder.classify(images=paths, data_set="shades")
    assert [max(one, key=one.get) for one in found] == labels
    # As the evaluation's probe has it, from the same features.
    features = encoder.embed(images=paths, space="features", data_set="shades")["images"]
    names = sorted(SHADES)
    targets = np.array([[label == name for name in names] for label in labels])
    logits, _ = probes.linear_probe(features, targets, features)
    expected = np.exp(logits - logits.max(1, keepdims=True))
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose([[one[name] for name in names] for one in found], expected, atol=1e-3)
    # The run's own classifiers are as they were.
    assert TrainedModel(toy_run).imp.classifiers.keys() < encoder.model.imp.classifiers.keys()


def test_rows_that_cannot_teach_are_one_line(toy_run, tmp_path, shades, write_manifest, capsys):
    manifest, files = shades
    rows = [{"id": str(i), "image": str(path), "labels": ["one"]} for i, (path, _) in enumerate(files)]
    alone = write_manifest(tmp_path / "alone.parquet", rows)
    assert export(toy_run, tmp_path / "out", alone, "--data-set", "digits") == 2
    assert "expected rows of at least two classes" in capsys.readouterr().err
    assert export(toy_run, tmp_path / "out", tmp_path / "none.parquet", "--data-set", "digits") == 2
    odd = tmp_path / "9 lives.parquet"
    shutil.copy(manifest, odd)
    assert export(toy_run, tmp_path / "out", odd, "--data-set", "digits") == 2
    assert "the file's name becomes the classifier's" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
