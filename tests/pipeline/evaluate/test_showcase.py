"""The pictures of a run: of an untrained model, so that every answer is known to be as likely as any other."""

import json
import shutil

import numpy as np
import pytest

from pipeline.evaluate.showcase import FILE, write_showcase
from pipeline.evaluate.showcase.answers import Classes, confusion
from pipeline.evaluate.showcase.cards import best_answers
from pipeline.evaluate.showcase.maps import plane
from pipeline.evaluate.showcase.sample import Sample
from pipeline.evaluate.trained_model import TrainedModel
from pipeline.report.report import write_report


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, toy_run):
    """A checkpoint of the toy recipe as it starts, with texts for its videos too, and one held-out image damaged."""
    return shutil.copytree(toy_run, tmp_path_factory.mktemp("showcase") / "run")


@pytest.mark.slow
def test_every_kind_of_picture_is_in_the_file_and_on_the_page(run_dir, browser, tmp_path):
    model = TrainedModel(run_dir)
    write_showcase(run_dir, model)
    found = json.loads((run_dir / FILE).read_text())
    assert found["step"] == 3 and (run_dir / FILE).stat().st_size < 1e6
    titles = [group["title"] for group in found["choices"]]
    assert "digits: image → nearest texts" in titles and "moving: audio → likeliest classes" in titles
    assert len(found["films"]) == 2 and len(found["films"][0]["by_video"]) == 5
    assert {m["title"] for m in found["confusions"]} >= {"digits, image, by its classifier"}
    # Ten held-out digits, each counted once.
    assert np.sum(found["confusions"][0]["counts"]) == 10
    assert {p["kind"] for m in found["maps"] for p in m["points"]} == {"image", "video", "audio", "text"}
    maps = found["expert_maps"]
    assert {m["title"].split(",")[0] for m in maps} == {"digits: image", "moving: video", "moving: audio"}
    assert all(len(m["layers"]) == len(model.imp.config.sparse_layers) for m in maps)

    path = write_report(run_dir)
    for width in (400, 1280):
        page = browser.opened(path, width=width)
        assert page.complaints == [] and page.too_wide() == []
        assert page.run("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        page.screenshot(f"report-{width}")
    page.print_pdf(tmp_path / "report.pdf")


def sample(labels: list[tuple[str, ...]], texts: list[tuple[str, ...]] | None = None) -> Sample:
    return Sample(None, [], {}, labels=labels, texts=texts or [()] * len(labels))


def test_answers_are_ranked_and_the_right_ones_marked():
    answers = Classes(["a", "b", "c"], np.array([[0.1, 0.7, 0.2]]))
    assert best_answers(sample([("c",)]), 0, answers) == [
        {"text": "b", "score": 0.7, "right": False},
        {"text": "c", "score": 0.2, "right": True},
        {"text": "a", "score": 0.1, "right": False},
    ]
    # A caption of the row is right as its label is.
    assert best_answers(sample([()], [("b",)]), 0, answers)[0]["right"]


def test_a_confusion_counts_rows_with_one_label_and_is_left_out_where_several_answers_are_right(make_data_set):
    one = sample([("a",)] * 6 + [("b",)] * 3 + [("a", "b"), ()])
    one.data_set = make_data_set("unused.parquet", name="set")
    scores = np.array([[0.9, 0.1]] * 8 + [[0.2, 0.8]] * 3)
    found = confusion(one, "image", Classes(["a", "b"], scores))
    assert found["counts"] == [[6, 0], [2, 1]] and found["classes"] == ["a", "b"]
    assert confusion(one, "image", Classes(["a", "b"], scores, is_exclusive=False)) is None
    assert confusion(one, "image", None) is None


def test_the_plane_keeps_the_distances_of_points_that_lie_in_one():
    """Two groups in a plane of ten dimensions, far apart: centred each about its own mean, or together."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(10, 2)))[0].T
    flat = [rng.normal(size=(5, 2)), rng.normal(size=(7, 2)) + 3]
    together = np.concatenate(plane([part @ basis for part in flat], centred=False))
    points = np.concatenate(flat)
    np.testing.assert_allclose(distances(together), distances(points), atol=1e-9)
    for shown, part in zip(plane([part @ basis for part in flat], centred=True), flat, strict=True):
        np.testing.assert_allclose(distances(shown), distances(part), atol=1e-9)
        np.testing.assert_allclose(shown.mean(0), 0, atol=1e-9)
    # A single point has no direction.
    assert plane([np.ones((1, 3))], centred=True)[0].shape == (1, 2)


def distances(points: np.ndarray) -> np.ndarray:
    return np.linalg.norm(points[:, None] - points[None], axis=-1)
