"""check.py on data made to be wrong in known ways."""

from __future__ import annotations

import json
import shutil
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline import recipe as recipes
from pipeline.check import _supply_line, check, print_check
from pipeline.cli import main
from pipeline.errors import RequestError
from pipeline.plain_console import plain_console


@pytest.fixture
def own_digits(toy_recipe, tmp_path):
    """The toy recipe over a copy of its digits; the returned function changes the rows of the training manifest."""
    source = Path(toy_recipe["data_sets"]["digits"]["manifest"]).parent
    shutil.copytree(source, tmp_path / "digits")
    path = tmp_path / "digits/train.parquet"
    toy_recipe["data_sets"]["digits"] |= {"manifest": str(path), "held_out": str(tmp_path / "digits/held_out.parquet")}

    def change(function):
        table = pq.read_table(path)
        rows = table.to_pylist()
        function(rows)
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)

    return toy_recipe, change


def test_good_data(toy_recipe):
    result = check(recipes.from_dict(toy_recipe), sample=5, step_s=0.25)
    assert result["usable"] and result["problems"] == []
    digits, moving = result["data_sets"]["digits"], result["data_sets"]["moving"]
    assert digits["sampled"] == 5 and digits["rejects"]["count"] == 0
    assert digits["media"]["image width"] == {"p5": 64.0, "p50": 64.0, "p95": 64.0}
    # 34 frames at 16 a second.
    assert moving["media"]["video duration_s"]["p50"] == pytest.approx(2.125, abs=0.15)
    assert moving["media"]["video fps"]["p50"] == 16.0
    assert moving["held_out"] == {"held_out": {"rows": 10, "ids_in_training": 0, "media_in_training": 0}}
    assert sum(digits["labels"]["most_common"].values()) == digits["rows"]
    cost = moving["decode_s_per_sample"]
    image = digits["decode_s_per_sample"]["image"]
    # Two tasks of 8 images (16 and 32 pixels: 8 and 2 a batch) over 38 rows each, one of 4 videos over 38 rows.
    expected = (image * (8 + 2) / 2 + image * 8 + 4 * (cost["video"] + cost["audio"])) / 3
    # And what it takes to make tokens of them, and Ray's share of a batch.
    assert expected + 0.02 <= result["decode_cpu_s_per_step"] < 5 * expected + 1
    assert result["decode_cpus"] == pytest.approx(result["decode_cpu_s_per_step"] / 0.25)
    assert "wait_share" not in result


def test_what_is_wrong_with_the_recipe_is_listed_once(toy_recipe, capsys):
    contrast = next(task for task in toy_recipe["tasks"].values() if task["data_set"] == "moving")
    contrast["batch_size"] = 64
    result = check(recipes.from_dict(toy_recipe), sample=1, step_s=0.25)
    assert sum("is more than the 38 rows of moving" in p for p in result["problems"]) == 1
    assert not result["usable"] and "more than the 38 rows" not in capsys.readouterr().err


def test_decode_and_steps_share_the_cpus_of_a_small_machine(toy_recipe, monkeypatch):
    """A step of 0.3 s on two CPUs beside decode of 0.2 s of CPU: a quarter of the time."""
    monkeypatch.setattr("pipeline.check.machine_cpus", lambda: 2)
    monkeypatch.setattr("pipeline.check.Forecast", lambda *_, **__: types.SimpleNamespace(step_s=lambda: 0.3))
    monkeypatch.setattr("pipeline.check._batch_cpu_s", lambda spec, task: 0.18)
    result = check(recipes.from_dict(toy_recipe), sample=1)
    # 0.18 s and Ray's 0.02 s.
    assert result["decode_cpu_s_per_step"] == pytest.approx(0.2)
    assert result["wait_share"] == pytest.approx(0.25) and result["decode_cpus"] == pytest.approx(0.2 / 0.3)
    assert "2 CPUs of this machine" in _supply_line(result)


def test_everything_wrong_is_named(own_digits, tmp_path):
    recipe, change = own_digits
    held_out = pq.read_table(tmp_path / "digits/held_out.parquet")["id"].to_pylist()

    def spoil(rows):
        rows[1]["id"] = rows[0]["id"]
        rows[2]["id"] = held_out[0]
        rows[3]["labels"] = ["cat"]
        rows[4]["image"] = "images/gone.png"
        (tmp_path / "digits" / rows[5]["image"]).write_bytes(b"not a picture")

    change(spoil)
    result = check(recipes.from_dict(recipe), sample=200)
    assert not result["usable"]
    found = result["data_sets"]["digits"]
    assert found["rejects"]["reasons"] == {"missing_file": 1, "not_decodable": 1}
    problems = "\n".join(result["problems"])
    for line in (
        f"digits: 2 of {found['rows']} sampled rows are bad (1 missing_file, 1 not_decodable); at most 5 % of rows",
        f"digits: 2 of {found['rows']} rows share an id with another one (1 such id, e.g. 'digit-0000' of 2 rows); ",
        "digits: 1 id of the 10 rows of held_out are in the training data too",
        f"digits: 1 of {found['rows']} rows have none of the classes of tasks classes, image_text: "
        "the label 'cat' (1 row) is not one of them; the classes are 'zero', 'one', 'two', 'three' and 6 more",
    ):
        assert line in problems, problems


def test_words_and_ids_that_are_no_text_are_survived(own_digits, tmp_path):
    recipe, _ = own_digits
    path = tmp_path / "digits/train.parquet"
    table = pq.read_table(path)
    ids = [b"\xff", *(i.encode() for i in table["id"].to_pylist()[1:])]
    labels = [[b"\xe9", None], None, *([x.encode() for x in row] for row in table["labels"].to_pylist()[2:])]
    words = pa.array(labels, pa.list_(pa.binary()))
    words = pa.ListArray.from_arrays(words.offsets, words.values.view(pa.string()), mask=words.is_null())
    table = table.drop(["id", "labels"])
    table = table.append_column("id", pa.array(ids, pa.binary()).view(pa.string())).append_column("labels", words)
    pq.write_table(table, path)
    result = check(recipes.from_dict(recipe), sample=3)
    (line,) = (p for p in result["problems"] if "none of the classes" in p)
    assert line.startswith(
        "digits: 2 of 38 rows have none of the classes of tasks classes, image_text: the label '\\xe9'"
    )
    assert result["data_sets"]["digits"]["duplicate_ids"]["count"] == 0


def test_a_row_without_an_id_is_a_wrong_request(own_digits):
    recipe, change = own_digits
    change(lambda rows: rows[3].update(id=None))
    with pytest.raises(RequestError, match="row 3: expected an id, found null"):
        check(recipes.from_dict(recipe), sample=3)


def test_captions_that_are_cut_are_named(toy_recipe):
    moving = {"data_set": "moving", "objective": "nce", "modalities": ["video", "text"], "batch_size": 4}
    toy_recipe["tasks"]["video_text"] = moving | {"variants": [{"size": 32, "frames": 8}], "text_length": 2}
    result = check(recipes.from_dict(toy_recipe), sample=10)
    assert result["usable"]
    assert any("are longer than tasks.video_text.text_length and are cut" in p for p in result["problems"])
    assert result["data_sets"]["moving"]["text"]["captions"] == 30


def test_the_job_prints_tables_or_json_and_exits_by_what_it_found(own_digits, tmp_path, capsys):
    recipe, change = own_digits
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    arguments = ["--config", str(path), "--sample", "3"]
    assert main(["check", *arguments]) == 0
    assert "no problems found" in capsys.readouterr().out
    change(lambda rows: rows[1].update(id=rows[0]["id"]))
    assert main(["check", *arguments, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["usable"] is False
    assert main(["check", *arguments, "--sample", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: --sample")


def test_ids_labels_and_reasons_are_printed_as_they_are(capsys):
    words = "[/dog] [red]x :cat:"
    found = {
        "rows": 1,
        "columns": [words],
        "sampled": 1,
        "rejects": {"count": 1, "examples": [{"id": words, "reason": "bad", "detail": words}]},
        "media": {},
        "decode_s_per_sample": {},
        "duplicate_ids": {"looked_at": 1},
        "held_out": {},
        "labels": {"distinct": 1, "most_common": {words: 1}},
        "text": {},
    }
    supply = {"decode_cpu_s_per_step": 1.0, "step_s": 1.0, "decode_cpus": 1.0}
    print_check({"data_sets": {words: found}, "problems": [words], **supply})
    assert capsys.readouterr().out.count(words) == 6
    plain_console().print("a\x1b[31m\x9bb\tc")
    assert capsys.readouterr().out.split() == ["a\ufffd[31m\ufffdb", "c"]


def test_captions_that_cannot_be_used_are_counted(toy_recipe, tmp_path):
    source = Path(toy_recipe["data_sets"]["moving"]["manifest"])
    table = pq.read_table(source)
    rows = table.to_pylist()[:10]
    for row in rows:
        row["video"] = str(source.parent / row["video"])
    rows[0]["text"], rows[1]["text"], rows[2]["text"] = [" "], ["x" * 100_001], ["left", ""]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), tmp_path / "m.parquet")
    toy_recipe["data_sets"]["moving"]["manifest"] = str(tmp_path / "m.parquet")
    moving = {"data_set": "moving", "objective": "nce", "modalities": ["video", "text"], "batch_size": 4}
    toy_recipe["tasks"] = {"video_text": moving | {"variants": [{"size": 32, "frames": 8}], "text_length": 16}}
    toy_recipe["text"]["vocab_size"] = 40
    result = check(recipes.from_dict(toy_recipe), sample=10)
    text = result["data_sets"]["moving"]["text"]
    assert text["unusable"] == {"no_text": 2, "text_too_long": 1} and text["rows_without_a_caption"] == 2
    assert not result["usable"]
    line = "moving: 2 of 10 sampled rows have no caption that can be used (2 no_text, 1 text_too_long); "
    assert line + "at most 5 % of rows may be rejected" in result["problems"]


@pytest.mark.slow
def test_the_page_shows_samples_as_the_model_sees_them_and_the_bad_rows(own_digits, tmp_path, browser):
    recipe, change = own_digits
    change(lambda rows: rows[3].update(image="absent-<b>.png"))
    path = tmp_path / "pages/check.html"
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe))
    assert main(["check", "--config", str(config), "--sample", "40", "--step-s", "1", "--html", str(path)]) in (0, 2)
    text = path.read_text()
    assert "1 of 38 decoded rows are bad." in text and "<b>.png" not in text
    names = list(recipe["tasks"])
    assert all(f"<h2>{name}</h2>" in text for name in names)
    for width in (400, 1280):
        page = browser.opened(path, width=width)
        assert page.complaints == [] and page.too_wide() == []
        # Four samples of each task, in every variant.
        assert page.run("document.querySelectorAll('.card').length") == 4 * len(names)
        assert page.run("[...document.images].every(i => i.naturalWidth > 0)")
        page.screenshot(f"check-{width}")
