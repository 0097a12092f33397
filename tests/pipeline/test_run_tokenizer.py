"""The choice of a run's tokenizer."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from pipeline import run_tokenizer
from pipeline.data.manifest import Manifest
from pipeline.data.tokenizer import Tokenizer, train_tokenizer
from pipeline.errors import RequestError
from pipeline.plan import plan
from pipeline.run_dir import claim


def claimed(recipe, run_dir):
    spec = plan(recipe, run_dir)
    claim(run_dir, spec)
    return spec


def test_the_run_keeps_its_own_tokenizer(tmp_path, make_pet_recipe):
    own = train_tokenizer(["some other words altogether"] * 5, vocab_size=40, into=tmp_path / "other.model")
    recipe = make_pet_recipe(text={"tokenizer": str(tmp_path / "other.model")})
    assert claimed(recipe, tmp_path / "run").data.tokenizer == own.model
    (tmp_path / "other.model").unlink()
    assert claimed(recipe, tmp_path / "run").data.tokenizer == own.model


def test_a_run_takes_a_tokenizer_json_and_keeps_it(tmp_path, make_pet_recipe, monkeypatch):
    """Six words, none of them a pad at 0: seven ids. The copy's name does not say what it is; its content does."""
    words = tokenizers.models.WordLevel({"a": 0, "cat": 1, "number": 2, "one": 3, "dog": 4, "?": 5}, unk_token="?")
    tokenizers.Tokenizer(words).save(str(tmp_path / "tokenizer.json"))
    recipe = make_pet_recipe(text={"tokenizer": "~/tokenizer.json"})
    monkeypatch.setenv("HOME", str(tmp_path))
    first = claimed(recipe, tmp_path / "run")
    copy = tmp_path / "run" / "tokenizer.model"
    assert first.data.tokenizer == copy.read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    assert first.model.vocab_size == 7
    (tmp_path / "tokenizer.json").unlink()
    assert claimed(recipe, tmp_path / "run") == first


def test_a_file_that_is_no_tokenizer_is_a_wrong_request(tmp_path, make_pet_recipe):
    (tmp_path / "config.json").write_text('{"vocab_size": 50257}')
    for name, found in (("config.json", "Cannot instantiate"), ("none.json", "found no file"), ("", "found no file")):
        with pytest.raises(RequestError, match=found):
            plan(make_pet_recipe(text={"tokenizer": str(tmp_path / name)}), tmp_path / "run")


def test_a_tokenizer_is_trained_on_the_usable_text_alone(tmp_path, make_pet_recipe, write_raw_manifest, pet_rows):
    good = [
        {"id": f"{i}".encode(), "image": b"x.png", "text": [t.encode() for t in pet_rows[i]["text"]]} for i in range(30)
    ]
    bad = [[b"\xff\xfe"], [], [None, b" "], None, ["ж".encode() * 1_000_000]]
    rows = [{"id": f"bad-{i}".encode(), "image": b"x.png", "text": text} for i, text in enumerate(bad)]
    (tmp_path / "x.png").touch()
    one = make_pet_recipe(rows=write_raw_manifest(tmp_path / "good.parquet", good))
    other = make_pet_recipe(rows=write_raw_manifest(tmp_path / "all.parquet", rows[:2] + good + rows[2:]))
    assert plan(one, tmp_path / "one").data.tokenizer == plan(other, tmp_path / "other").data.tokenizer


@pytest.mark.parametrize(
    ("texts", "why"),
    [([None, []], ""), ([[" "], [None, ""]], r" \(2 no_text\)"), ([["x" * 5], ["yy" * 5]], r" \(2 text_too_long\)")],
)
def test_no_usable_caption_is_named_with_its_data_set(
    tmp_path, make_pet_recipe, write_manifest, pet_rows, pet_task, texts, why
):
    rows = [row | {"text": text} for row, text in zip(pet_rows, texts, strict=False)]
    manifest = write_manifest(tmp_path / "data" / "none.parquet", rows)
    parts = {"task": pet_task | {"batch_size": 2}, "text": {"vocab_size": 60, "max_characters": 4}}
    said = (
        rf"pets: none of the 2 rows of .*none\.parquet has a caption that can be used{why}, and tasks\.pet_text reads"
    )
    with pytest.raises(RequestError, match=said):
        plan(make_pet_recipe(rows=manifest, **parts), tmp_path / "run")


def test_the_tokenizer_is_the_same_in_every_run(tmp_path, make_pet_recipe):
    one, other = (plan(make_pet_recipe(), tmp_path / name) for name in ("a", "b"))
    assert one.data.tokenizer == other.data.tokenizer


def test_a_tokenizer_of_labels_knows_them_in_their_prompts(tmp_path, make_pet_recipe, pet_task):
    spec = plan(make_pet_recipe(task=pet_task | {"text": "labels"}, text={"vocab_size": 200}), tmp_path / "run")
    ids = Tokenizer(spec.data.tokenizer).encode("a small picture with dog", 32)
    assert ids.any() and 1 not in ids


def test_without_text_there_is_no_tokenizer(tmp_path, make_pet_recipe, pet_task):
    task = {k: v for k, v in pet_task.items() if k != "text_length"} | {"objective": "softmax", "modalities": ["image"]}
    spec = plan(make_pet_recipe(task=task), tmp_path / "run")
    assert spec.data.tokenizer is None and not (tmp_path / "run" / "tokenizer.model").exists()


@pytest.mark.parametrize(("limit", "value"), [("_MAX_CAPTIONS", 8192), ("_MAX_CHARACTERS", 40_000)])
def test_a_tokenizer_learns_from_all_over_a_sorted_manifest(tmp_path, monkeypatch, limit, value):
    """The first captions of a manifest sorted by what they show are of one thing."""
    texts = [[f"thing {i // 4096}"] for i in range(5 * 4096)]
    pq.write_table(pa.table({"id": [str(i) for i in range(len(texts))], "text": texts}), tmp_path / "m.parquet")
    monkeypatch.setenv("IMP_CACHE", str(tmp_path))
    monkeypatch.setattr(run_tokenizer, limit, value)
    found = list(run_tokenizer._captions(Manifest(str(tmp_path / "m.parquet")), max_characters=100))
    assert len(set(found)) >= 2 and found[-1] == "thing 4"
    assert len(found) <= 8192
