"""Evaluation from the command line: of manifests that no task trained on, and requests that are refused in one line."""

import dataclasses
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.cli import main
from pipeline.evaluate import held_out, workers
from pipeline.evaluate.evaluator import Evaluator
from pipeline.evaluate.measure import evaluate
from pipeline.evaluate.measurement import measurements
from pipeline.evaluate.trained_model import TrainedModel
from pipeline.recipe import EvaluationSettings

SHADES = {"black": 0, "grey": 128, "white": 255}


@pytest.fixture(scope="module")
def shades(tmp_path_factory, write_manifest):
    """A folder with pictures of three shades, four of each for learning and four to measure, with labels and texts."""
    folder = tmp_path_factory.mktemp("shades")
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        rows = []
        for number in range(12):
            name = list(SHADES)[number % 3]
            pixels = np.clip(SHADES[name] + rng.integers(-9, 10, (40, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{part}-{number}.png")
            rows.append(
                {"id": f"{part}-{number:02}", "image": f"{part}-{number}.png", "labels": [name], "text": [name]}
            )
        write_manifest(folder / f"{part}.parquet", rows)
    return folder


@pytest.fixture(scope="module")
def model(toy_run):
    return TrainedModel(toy_run)


@pytest.fixture
def measured(model):
    """The only entry of a measurement."""

    def run(**entry) -> dict:
        (found,) = evaluate(Evaluator(model), [EvaluationSettings(modality=entry.pop("modality", "image"), **entry)])
        return found

    return run


def test_zero_shot_of_classes_that_were_never_trained(shades, toy_run, tmp_path, capsys):
    """By the command line alone."""
    (tmp_path / "classes.txt").write_text("black\ngrey\nwhite\nblue\n")
    rows = ("--manifest", f"{shades}/test.parquet", "--classes", f"{tmp_path}/classes.txt", "--prompts", "a {}")
    assert main(["evaluate", "--run", str(toy_run), "--out", str(tmp_path / "out.json"), *rows]) == 0
    (found,) = json.loads((tmp_path / "out.json").read_text())
    assert (found["dataset"], found["task"], found["num_examples"], found["num_classes"]) == (
        "test",
        "zero_shot_image",
        12,
        4,
    )
    assert found["chance"]["acc1"] == 0.25 and 0 <= found["metrics"]["acc1"] <= 1
    kept = ("step", "input", "clips", "prompts", "routing_group")
    assert [found[name] for name in kept] == [3, "32x32", 1, ["a {}"], "sample"]
    assert set(found["per_class"]["recall"]) == set(SHADES) and not (toy_run / "eval.json").exists()
    out = capsys.readouterr().out.splitlines()
    assert out[1] == "test zero_shot_image, 32x32, 12 examples" and out[2].startswith("  acc1 ") and "25.0 %" in out[2]
    assert max(map(len, out[:3])) <= 80


def test_probes_learn_shades_and_pixels_tell_them_apart_without_learning(measured, shades):
    more = {"manifest": f"{shades}/test.parquet", "fit": f"{shades}/train.parquet", "baseline": True}
    probe, neighbours = (measured(kind=kind, **more) for kind in ("linear_probe", "knn"))
    assert probe["metrics"]["lp_acc1"] == probe["baseline"]["lp_acc1"] == 1.0
    assert (probe["fit_rows"], probe["chance"]["lp_acc1"], probe["fit"]) == (12, pytest.approx(1 / 3), more["fit"])
    assert neighbours["metrics"]["knn_acc1"] == 1.0 and neighbours["neighbours"] == 12


def test_equal_texts_are_right_in_retrieval(measured, shades):
    rows = {"manifest": f"{shades}/test.parquet", "kind": "retrieval", "sizes": [16]}
    found = measured(**rows)
    kept = ("task", "input", "positives", "num_texts")
    assert [found[name] for name in kept] == ["retrieval_image", "16x16", "labels", 12]
    # Four of the twelve texts are right for each picture.
    assert found["chance"]["text_retrieval_recall@1"] == pytest.approx(1 / 3)
    by_row = measured(**rows, positives="instance")
    assert by_row["chance"]["text_retrieval_recall@1"] == pytest.approx(1 / 12)


def test_sounds_find_videos(measured):
    found = measured(data_set="moving", kind="retrieval", modality="video", other="audio", clips=2)
    assert {name.partition("_retrieval")[0] for name in found["metrics"]} == {"video_audio", "audio_video"}
    assert (found["clips"], found["other"], found["num_examples"]) == (2, "audio", 10)


def test_rows_with_several_labels_are_measured_by_average_precision(measured):
    """A moving digit has two labels: its name and its direction."""
    found = measured(data_set="moving", kind="zero_shot", modality="video")
    assert list(found["metrics"]) == ["mean_average_precision"] and found["num_classes"] == 14
    # Two of fourteen labels a row.
    assert found["chance"]["mean_average_precision"] == pytest.approx(2 / len(found["per_class"]["average_precision"]))


def test_results_do_not_depend_on_the_order_of_rows_or_on_threads(model, shades, tmp_path, monkeypatch, write_manifest):
    """Routing is by sample: experts see no other row."""
    rows = pq.read_table(shades / "test.parquet").to_pylist()
    order = np.random.default_rng(1).permutation(len(rows))
    shutil.copytree(shades, tmp_path / "copy")
    shuffled = write_manifest(tmp_path / "copy/shuffled.parquet", [rows[i] for i in order])
    entries = [
        {"kind": "zero_shot", "modality": "image", "classes": list(SHADES)},
        {"kind": "retrieval", "modality": "image"},
        {"kind": "linear_probe", "modality": "image", "fit": str(shades / "train.parquet")},
        {"kind": "knn", "modality": "image", "fit": str(shades / "train.parquet"), "baseline": True},
    ]

    def results(manifest: str) -> list[dict]:
        asked = [EvaluationSettings(manifest=manifest, **entry) for entry in entries]
        kept = ("metrics", "intervals", "chance", "per_class", "baseline")
        return [{name: r.get(name) for name in kept} for r in evaluate(Evaluator(model), asked)]

    monkeypatch.setattr(held_out, "_CHUNK", 1)
    first = results(str(shades / "test.parquet"))
    monkeypatch.setattr(held_out, "machine_cpus", lambda: 1)
    assert results(shuffled) == first


def test_rows_shared_out_to_workers_give_the_same_features(model, monkeypatch):
    """In parts that end in any order; the reject is counted once."""
    monkeypatch.setattr(workers, "_MIN_ROWS", 3)
    rows = [EvaluationSettings(kind="zero_shot", modality="video", data_set="moving", clips=2)]
    (measurement,) = measurements(model, rows[0])
    taken: list[int] = []

    def elsewhere(parts):
        parts = list(parts)
        taken.extend(len(part.rows) for part in parts)
        return (workers._pool(model, part) for part in reversed(parts))

    here = Evaluator(model).rows(measurement)
    there = Evaluator(model, make=workers.shared_out(elsewhere, num_workers=2)).rows(measurement)
    assert taken == [3, 3, 3, 1] and np.array_equal(here.features, there.features)
    assert dataclasses.replace(here, features=None) == dataclasses.replace(there, features=None)


def test_credentials_of_a_manifest_reach_no_result(model):
    uri = "s3://KEY:SECRET@bucket/birds/test.parquet?X-Amz-Signature=abc"
    (found,) = measurements(model, EvaluationSettings(kind="zero_shot", modality="image", manifest=uri, classes=["a"]))
    assert (found.label, found.manifest) == ("test", uri)


def test_a_sample_of_rows_is_always_the_same():
    rows = held_out.sample_of(1000, 10)
    assert rows == held_out.sample_of(1000, 10) == sorted(set(rows)) and len(rows) == 10
    assert list(held_out.sample_of(5, 10)) == list(held_out.sample_of(5, None)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--manifest", "nowhere.parquet"], "manifest "),
        (["--kind", "knn"], "expected --manifest or --data-set: the rows to measure"),
        (
            ["--data-set", "digit", "--kind", "knn", "--modality", "image"],
            "evaluate.data_set: unknown name 'digit'; did you",
        ),
        (
            ["--manifest", "{shades}", "--classes", "black", " "],
            "classes: expected a text for every class, found an empty",
        ),
        (["--manifest", "{shades}", "--classes", "blue"], "evaluate: no row of test has one of the classes blue"),
        (
            ["--manifest", "{shades}", "--kind", "retrieval", "--modality", "audio"],
            "evaluate: retrieval of audio needs the pair audio_text; trained are audio_vision, text_vision",
        ),
        (
            ["--manifest", "{shades}", "--kind", "zero_shot", "--modality", "video", "--classes", "black"],
            "manifest {shades}: expected a column video, for video; found id, image, labels, text",
        ),
        (
            ["--manifest", "{words}", "--kind", "zero_shot", "--modality", "image", "--classes", "black"],
            "manifest {words}: column 'labels': expected a list of strings, found string",
        ),
        (
            ["--manifest", "{words}", "--kind", "retrieval", "--modality", "image"],
            "manifest {words}: expected column 'text' (needed by retrieval); found id, image, labels",
        ),
        (
            ["--manifest", "{shades}", "--kind", "knn", "--modality", "image", "--data-set", "digits"],
            "knn: expected rows to learn from with the classes of test (black, grey, white), found eight, five, four",
        ),
        (["--manifest", "{shades}", "--kind", "knn"], "knn: expected fit, a manifest of labelled rows to learn from"),
        (["--manifest", "{shades}", "--sizes", "20"], "sizes and frames: variant 20x20: "),
        (["--manifest", "{shades}", "--set", "clip=2"], "unknown key 'clip'; did you mean 'clips'?"),
        (["--manifest", "{shades}", "--step", "best"], "no checkpoint is kept as the best: "),
        (["--step", "9"], "step 9: expected one of the checkpoints [3]"),
    ],
)
def test_wrong_requests_are_one_line_and_exit_2(toy_run, shades, tmp_path, capsys, arguments, line):
    place = {"shades": shades / "test.parquet", "words": tmp_path / "words.parquet"}
    words = pa.table({"id": ["a"], "image": ["a.png"], "labels": ["black"]})
    pq.write_table(words, place["words"])
    assert main(["evaluate", "--run", str(toy_run), *(a.format(**place) for a in arguments)]) == 2
    found = [text for text in capsys.readouterr().err.splitlines() if not text.startswith("waiting for")]
    assert len(found) == 1 and found[0].startswith(f"error: {line.format(**place)}"), found


def test_an_unknown_run_is_one_line_and_exit_2(tmp_path, capsys):
    assert main(["evaluate", "--run", str(tmp_path / "no")]) == 2
    assert (
        capsys.readouterr().err
        == f"error: --run {tmp_path}/no: expected a run directory with checkpoints, found none\n"
    )
