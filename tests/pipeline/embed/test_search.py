"""Search is exact in any blocks, says what it cannot compare, and its pages hold in a real browser."""

import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cli import main
from pipeline.embed import search as searching
from pipeline.embed.explorer import _spread_order, nearest, write_explorer
from pipeline.embed.search import Query, Search, query_of
from pipeline.embed.search_page import write_page
from pipeline.errors import RequestError

MAX_PAGE_BYTES = 8_000_000


@pytest.fixture(scope="module")
def search(held_out):
    found = Search(held_out)
    yield found
    found.decoders.close()


def _expected(items: list[dict], vector: np.ndarray, modality: str, space: str) -> list[str]:
    mine = [row for row in items if row["modality"] == modality]
    scores = np.array([row[space] for row in mine], np.float32) @ vector
    return [mine[i]["source"] for i in np.argsort(-scores, kind="stable")]


@pytest.mark.parametrize("rows", [3, 16_384])
def test_the_nearest_are_exact_whatever_the_blocks(search, encoder, held_out, read_items, monkeypatch, rows):
    monkeypatch.setattr(searching, "_ROWS_PER_BLOCK", rows)
    found = search.nearest(Query("text", "the digit three moving left"), 4)
    items = read_items(held_out)
    for modality, data_set in (("image", "digits"), ("video", "moving")):
        vector = encoder.embed(texts=["the digit three moving left"], space="text_vision", data_set=data_set)["texts"]
        expected = _expected(items, vector[0], modality, "text_vision")[:4]
        assert [hit.source for hit in found.hits[modality]] == expected
        assert found.compared[modality] == 10 and {hit.space for hit in found.hits[modality]} == {"text_vision"}
    texts = [hit.source for hit in found.hits["text"]]
    assert len(set(texts)) == len(texts) == 4
    assert found.unreachable == ("audio",)


def test_a_file_finds_itself_and_a_sound_is_compared_by_the_space_of_its_pair(search, held_out, read_items):
    video = next(row["source"] for row in read_items(held_out) if row["modality"] == "video")
    found = search.nearest(query_of(None, video, None), 3)
    assert found.hits["video"][0].source == video and found.hits["video"][0].score > 0.999
    assert {hit.space for hit in found.hits["audio"]} == {"audio_vision"}
    by_sound = search.nearest(query_of(None, video, "audio"), 3)
    assert by_sound.hits["audio"][0].source == video and by_sound.unreachable == ("image", "text")


def test_a_path_in_place_of_a_text_is_refused(tmp_path):
    (tmp_path / "cat.jpg").write_bytes(b"x")
    with pytest.raises(RequestError, match=r"expected a text, found a file; .* --file .*cat\.jpg"):
        query_of(str(tmp_path / "cat.jpg"), None, None)
    assert query_of("no cat.jpg", None, None) == Query("text", "no cat.jpg")


def test_equal_scores_keep_the_earlier_item_and_values_that_are_not_finite_come_last():
    vectors = np.array([[1, 0], [np.nan, 0], [1, 0], [0, 1], [1, 0]], np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 2, mask=pa.array([False] * 4 + [True]))
    rows, scores = searching._scores(column, np.arange(5), np.array([1, 0], np.float32))
    assert rows.tolist() == [0, 1, 2, 3] and scores.tolist() == [1, -np.inf, 1, 0]
    words = {name: pa.nulls(5, pa.string()) for name in searching._SHOWN} | {"id": list("abcde")}
    top = []
    searching._keep_best(top, pa.RecordBatch.from_pydict(words), rows, scores, count=2, space="s")
    assert [hit.id for _, _, hit in sorted(top, reverse=True)] == ["a", "c"]


def test_wrong_queries_and_damaged_folders_are_one_line_and_exit_2(held_out, tmp_path, capsys):
    def fails(*arguments: str) -> str:
        assert main(["search", *arguments]) == 2
        # A slow machine says what it waits for.
        (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("waiting for")]
        return line

    folder = ("--in", str(held_out))
    assert "expected a text" in fails(*folder)
    assert "found no such file" in fails("--file", str(tmp_path / "no.png"), *folder)
    (tmp_path / "data.csv").write_text("1")
    assert "expected an ending" in fails("--file", str(tmp_path / "data.csv"), *folder)
    assert "--space: expected one of text_vision, audio_vision" in fails("a", "--space", "no", *folder)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert "cannot be read: not_decodable" in fails("--file", str(tmp_path / "broken.png"), *folder)
    assert "no_text" in fails(" ", *folder)
    assert "found no embeddings.json" in fails("a", "--in", str(tmp_path))
    (tmp_path / "embeddings.json").write_text("{}")
    assert "damaged embeddings.json" in fails("a", "--in", str(tmp_path))
    shutil.copytree(held_out, tmp_path / "copy")
    (tmp_path / "copy/model/model.safetensors").write_bytes(b"short")
    assert "bytes that were exported" in fails("a", "--in", str(tmp_path / "copy"))


def test_a_model_that_was_exchanged_and_a_damaged_part_are_said(held_out, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(held_out, copy)
    description = json.loads((copy / "embeddings.json").read_text())
    part = sorted((copy / "parts").iterdir())[0]
    part.write_bytes(part.read_bytes()[:-9])
    assert main(["search", "three", "--in", str(copy)]) == 1
    assert re.search(
        r"^failed: .+parquet: expected a part of embeddings: .+\n\Z", capsys.readouterr().err, re.MULTILINE
    )
    part.unlink()
    assert main(["search", "three", "--in", str(copy)]) == 0
    assert "10 rows are not embedded yet" in capsys.readouterr().out
    (copy / "embeddings.json").write_text(json.dumps(description | {"digest": "0" * 64}))
    with pytest.raises(RequestError, match="no longer the model"):
        Search(copy)


def _check(page, path) -> None:
    assert page.complaints == [] and page.too_wide() == []
    assert page.run("[...document.images].every(i => i.alt && i.naturalWidth > 0)")
    assert path.stat().st_size < MAX_PAGE_BYTES


@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_of_a_search_holds_everything_in_itself(search, held_out, read_items, browser, tmp_path, width):
    path = tmp_path / "search.html"
    audio = next(row["source"] for row in read_items(held_out) if row["modality"] == "audio")
    write_page(search, search.nearest(Query("audio", audio), 4), path)
    page = browser.opened(path, width=width)
    _check(page, path)
    ready = "a.readyState > 0 ? 1 : new Promise(done => a.onloadedmetadata = () => done(1))"
    assert page.run(f"Promise.all([...document.querySelectorAll('audio')].map(a => {ready}))") == [1] * 5
    assert page.run("document.querySelectorAll('main li').length") == 8
    page.screenshot(f"search-{width}")


@pytest.mark.slow
def test_words_from_data_are_text_in_a_page_and_nothing_else(held_out, browser, tmp_path):
    copy, evil = tmp_path / "copy", "</script><script>alert(1)</script><b id='evil'>\" onload='x'"
    shutil.copytree(held_out, copy)
    for part in (copy / "parts").iterdir():
        table = pq.read_table(part)
        column = table.schema.get_field_index("caption")
        pq.write_table(table.set_column(column, table.schema.field(column), pa.array([evil] * len(table))), part)
    search = Search(copy)
    write_page(search, search.nearest(Query("text", "three" + evil), 2), tmp_path / "search.html")
    search.decoders.close()
    for path in (tmp_path / "search.html", write_explorer(copy)):
        page = browser.opened(path, width=400)
        _check(page, path)
        assert page.run("document.getElementById('evil')") is None
        assert evil in page.run("document.body.innerText")


def test_the_explorer_shows_the_nearest_of_what_is_chosen_by_click_and_by_key(held_out, browser):
    path = write_explorer(held_out)
    page = browser.opened(path, width=400)
    _check(page, path)
    for width in (400, 1280):
        page.resize(width, 800)
        assert page.too_wide() == [] or width != 400
        page.screenshot(f"explore-{width}")
    data = json.loads(page.run("document.getElementById('data').textContent"))
    shown = "[...document.querySelectorAll('#near h3')].map(h => h.textContent)"
    image, sound = (next(i for i, item in enumerate(data["items"]) if item[0] == name) for name in ("image", "audio"))
    page.run(f"document.querySelector('[data-number=\"{image}\"]').click()")
    assert page.run(shown) == ["Videos", "Texts"] and "sounds: no common space" in page.run("near.innerText")
    page.run(f"document.querySelector('[data-number=\"{sound}\"]').focus()")
    page.run("document.querySelector('nav [data-show=audio]').click()")
    page.run(f"document.querySelector('[data-number=\"{sound}\"]').focus()")
    page.press("ArrowRight")
    page.press("Enter")
    assert page.run("location.hash") == f"#{sound + 1}" and page.run(shown) == ["Videos"]
    best = data["nearest"][sound + 1]["video"][0][0]
    assert page.run("document.querySelector('#near h3 + ol .go').textContent").endswith(data["items"][best][1])
    assert page.complaints == []


def test_the_explorer_knows_the_nearest_by_cosine_and_samples_all_over(search):
    def item(modality, x, y):
        from pipeline.embed.explorer import Shown

        return Shown(modality, "n", "s", "d", (None, None), {"text_vision": np.array([x, y], np.float32)})

    items = [item("image", 1, 0), item("text", 0.6, 0.8), item("text", 0.8, 0.6), item("image", 0, 1)]
    assert nearest(items, search) == [
        {"text": [[2, 0.8], [1, 0.6]]},
        {"image": [[3, 0.8], [0, 0.6]]},
        {"image": [[0, 0.8], [3, 0.6]]},
        {"text": [[1, 0.8], [2, 0.6]]},
    ]
    assert _spread_order(6) == [0, 4, 2, 1, 5, 3] and _spread_order(1) == [0]
