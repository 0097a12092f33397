"""From a recipe to a run that can start: manifests checked, tokenizer there, the run directory its own."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import yaml

from pipeline import prepare as prepare_module
from pipeline import recipe as recipes
from pipeline.data.manifest import Manifest
from pipeline.data.shards import FORMAT
from pipeline.data.tokenizer import train_tokenizer
from pipeline.errors import RequestError
from pipeline.prepare import check_run_dir, lock_run_dir, needed_columns, prepare
from pipeline.train.mixture.schedule import START

ROWS = [
    {"id": f"id-{i}", "image": f"{i}.png", "text": [f"a cat number {i}", "one dog"], "labels": ["cat"]}
    for i in range(30)
]
TASK = {
    "data_set": "pets",
    "objective": "nce",
    "modalities": ["image", "text"],
    "batch_size": 8,
    "variants": [{"size": 64}],
    "text_length": 16,
}


@pytest.fixture
def make_recipe(tmp_path, write_manifest):
    """A recipe over a manifest of thirty rows; nothing is decoded, so an image is an empty file."""
    manifest = write_manifest(tmp_path / "data" / "m.parquet", ROWS)
    for row in ROWS:
        (tmp_path / "data" / row["image"]).touch()

    def make(*, rows: str = manifest, task: dict = TASK, **parts) -> recipes.Recipe:
        raw = {
            "data_sets": {"pets": {"manifest": rows, "classes": ["cat", "dog"]}},
            "tasks": {"pet_text": task},
            "train": {"num_steps": 10},
            "text": {"vocab_size": 60},
        }
        return recipes.from_dict(raw | parts)

    return make


def test_logging_as_plain_data(tmp_path, make_recipe):
    logging = prepare(make_recipe(), tmp_path / "default").logging
    assert (logging.writers, logging.project, logging.profile_steps, logging.peak_flops) == (
        ("tensorboard",), "imp", None, None
    )  # fmt: skip
    assert "decode pets once" in logging.feed_advice["pet_text"]
    asked = {"writers": [], "project": "x", "profile_steps": [3, 5], "peak_tflops": 1.5, "progress": "none"}
    logging = prepare(make_recipe(logging=asked), tmp_path / "asked").logging
    assert (logging.writers, logging.project, logging.profile_steps, logging.peak_flops, logging.progress) == (
        (), "x", (3, 5), 1.5e12, "none"
    )  # fmt: skip


def test_a_writer_that_is_not_installed_is_a_wrong_request(tmp_path, make_recipe, monkeypatch):
    monkeypatch.setattr("pipeline.train.telemetry.writers._importable", lambda name: name == "tensorboard")
    with pytest.raises(RequestError) as caught:
        prepare(make_recipe(logging={"writers": ["tensorboard", "mlflow"]}), tmp_path / "run")
    assert str(caught.value) == (
        "logging.writers: mlflow is not installed; run pip install 'imp[mlflow]', or leave it out"
    )
    assert not (tmp_path / "run").exists()


def test_prepare_fills_the_run_directory(tmp_path, make_recipe):
    run_dir, recipe = tmp_path / "run", make_recipe(seed=5)
    spec = prepare(recipe, run_dir)
    assert sorted(p.name for p in run_dir.iterdir()) == ["config.yaml", "tokenizer.model"]
    assert yaml.safe_load((run_dir / "config.yaml").read_text()) == recipe.to_dict() == spec.recipe
    assert spec.data.tokenizer == (run_dir / "tokenizer.model").read_bytes()
    assert (
        spec.data.num_rows == {"pets": 30}
        and (spec.mixture.seed, spec.mixture.num_steps) == (5, 10)
        and spec.run_dir == str(run_dir)
    )
    assert list(spec.data.tasks) == ["pet_text"] and spec.model.vocab_size > 16
    assert (spec.placement.expert_parallel, spec.placement.fsdp) == (1, False)
    assert spec.schedule(START).batches_before(10) == {"pet_text": 10}


def test_how_parameters_lie_over_devices_reaches_the_run(tmp_path, make_recipe):
    spec = prepare(make_recipe(cluster={"expert_parallel": 2, "fsdp": True}), tmp_path / "run")
    assert (spec.placement.expert_parallel, spec.placement.fsdp) == (2, True)
    check_run_dir(make_recipe(), tmp_path / "run")


def test_preparing_again_changes_nothing(tmp_path, make_recipe):
    run_dir = tmp_path / "run"
    first = prepare(make_recipe(), run_dir)
    check_run_dir(make_recipe(), run_dir)
    assert prepare(make_recipe(), run_dir) == first


def test_the_run_keeps_its_own_tokenizer(tmp_path, make_recipe):
    own = train_tokenizer(["some other words altogether"] * 5, vocab_size=40, into=tmp_path / "other.model")
    recipe = make_recipe(text={"tokenizer": str(tmp_path / "other.model")})
    assert prepare(recipe, tmp_path / "run").data.tokenizer == own.model
    (tmp_path / "other.model").unlink()
    assert prepare(recipe, tmp_path / "run").data.tokenizer == own.model


def test_a_run_takes_a_tokenizer_json_and_keeps_it(tmp_path, make_recipe, monkeypatch):
    """Six words, none of them a pad at 0: seven ids. The copy's name does not say what it is; its content does."""
    words = tokenizers.models.WordLevel({"a": 0, "cat": 1, "number": 2, "one": 3, "dog": 4, "?": 5}, unk_token="?")
    tokenizers.Tokenizer(words).save(str(tmp_path / "tokenizer.json"))
    recipe = make_recipe(text={"tokenizer": "~/tokenizer.json"})
    monkeypatch.setenv("HOME", str(tmp_path))
    first = prepare(recipe, tmp_path / "run")
    copy = tmp_path / "run" / "tokenizer.model"
    assert first.data.tokenizer == copy.read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    assert first.model.vocab_size == 7
    (tmp_path / "tokenizer.json").unlink()
    assert prepare(recipe, tmp_path / "run") == first


def test_a_file_that_is_no_tokenizer_is_a_wrong_request(tmp_path, make_recipe):
    (tmp_path / "config.json").write_text('{"vocab_size": 50257}')
    for name, found in (("config.json", "Cannot instantiate"), ("none.json", "found no file"), ("", "found no file")):
        with pytest.raises(RequestError, match=found):
            prepare(make_recipe(text={"tokenizer": str(tmp_path / name)}), tmp_path / "run")


def test_a_tokenizer_is_trained_on_the_usable_text_alone(tmp_path, make_recipe, write_raw_manifest):
    good = [
        {"id": f"{i}".encode(), "image": b"x.png", "text": [t.encode() for t in ROWS[i]["text"]]} for i in range(30)
    ]
    bad = [[b"\xff\xfe"], [], [None, b" "], None, ["ж".encode() * 1_000_000]]
    rows = [{"id": f"bad-{i}".encode(), "image": b"x.png", "text": text} for i, text in enumerate(bad)]
    (tmp_path / "x.png").touch()
    one = make_recipe(rows=write_raw_manifest(tmp_path / "good.parquet", good))
    other = make_recipe(rows=write_raw_manifest(tmp_path / "all.parquet", rows[:2] + good + rows[2:]))
    assert prepare(one, tmp_path / "one").data.tokenizer == prepare(other, tmp_path / "other").data.tokenizer


def test_a_row_without_an_id_is_a_wrong_request(tmp_path, make_recipe, write_manifest):
    rows = write_manifest(tmp_path / "m.parquet", [*ROWS[:7], ROWS[7] | {"id": None}, *ROWS[8:]])
    with pytest.raises(RequestError, match="row 7: expected an id, found null"):
        prepare(make_recipe(rows=rows), tmp_path / "run")


def test_the_tokenizer_is_the_same_in_every_run(tmp_path, make_recipe):
    assert (
        prepare(make_recipe(), tmp_path / "a").data.tokenizer == prepare(make_recipe(), tmp_path / "b").data.tokenizer
    )


def test_a_tokenizer_of_labels_knows_them_in_their_prompts(tmp_path, make_recipe):
    from pipeline.data.tokenizer import Tokenizer

    spec = prepare(make_recipe(task=TASK | {"text": "labels"}, text={"vocab_size": 200}), tmp_path / "run")
    ids = Tokenizer(spec.data.tokenizer).encode("a small picture with dog", 32)
    assert ids.any() and 1 not in ids


def test_without_text_there_is_no_tokenizer(tmp_path, make_recipe):
    task = {k: v for k, v in TASK.items() if k != "text_length"} | {"objective": "softmax", "modalities": ["image"]}
    spec = prepare(make_recipe(task=task), tmp_path / "run")
    assert spec.data.tokenizer is None and not (tmp_path / "run" / "tokenizer.model").exists()


# --- manifests against tasks ---


@pytest.mark.parametrize(
    ("fields", "has", "columns"),
    [
        ({"modalities": ("image",), "objective": "softmax"}, set(), {"id", "image", "labels"}),
        ({"modalities": ("image", "text"), "objective": "nce"}, set(), {"id", "image", "text"}),
        ({"modalities": ("image", "text"), "objective": "nce", "text": "labels"}, set(), {"id", "image", "labels"}),
        (
            {"modalities": ("image", "text"), "objective": "nce", "positives": "labels"},
            set(),
            {"id", "image", "text", "labels"},
        ),
        (
            {"modalities": ("image", "text"), "objective": {"nce": 1.0, "softmax": 1.0}},
            set(),
            {"id", "image", "text", "labels"},
        ),
        ({"modalities": ("video", "audio"), "objective": "nce"}, {"video"}, {"id", "video"}),
        ({"modalities": ("video", "audio"), "objective": "nce"}, {"video", "audio"}, {"id", "video", "audio"}),
        ({"modalities": ("audio",), "objective": "sigmoid"}, {"video"}, {"id", "video", "labels"}),
        ({"modalities": ("audio",), "objective": "sigmoid"}, set(), {"id", "audio", "labels"}),
    ],
)
def test_columns_a_task_reads(make_task, fields, has, columns):
    found = needed_columns(make_task(**fields), has=has)
    assert set(found) == columns and set(found.values()) == {"task toy_task"}


def test_a_missing_column_is_named(tmp_path, make_recipe, write_manifest):
    rows = write_manifest(tmp_path / "few.parquet", ROWS, columns=["id", "image"])
    with pytest.raises(RequestError, match=r"expected column 'text' \(needed by task pet_text\); found id, image"):
        prepare(make_recipe(rows=rows), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("column", "values"),
    [("text", [f"a cat number {i}" for i in range(30)]), ("labels", ["cat"] * 30), ("id", list(range(30)))],
)
def test_a_column_of_another_type_is_a_wrong_request(tmp_path, make_recipe, column, values):
    """One string is not a list of strings: taken as one, a caption would be its letters."""
    table = {name: [row[name] for row in ROWS] for name in ROWS[0]} | {column: values}
    pq.write_table(pa.table(table), tmp_path / "typed.parquet")
    task = TASK | {"positives": "labels"}
    with pytest.raises(RequestError, match=column):
        prepare(make_recipe(rows=str(tmp_path / "typed.parquet"), task=task), tmp_path / "run")


def test_rows_of_shards_are_counted(tmp_path, make_recipe):
    (tmp_path / "shards").mkdir()
    index = {"format": FORMAT, "fingerprint": {"num_rows": 9}}
    (tmp_path / "shards" / "index.json").write_text(json.dumps(index))
    sets = {"pets": make_recipe().to_dict()["data_sets"]["pets"] | {"shards": str(tmp_path / "shards")}}
    assert prepare(make_recipe(data_sets=sets), tmp_path / "run").data.num_rows == {"pets": 9}
    (tmp_path / "shards" / "index.json").write_text(json.dumps(index | {"fingerprint": {"num_rows": 0}}))
    with pytest.raises(RequestError, match=r"data_sets\.pets\.shards: .* has no rows"):
        prepare(make_recipe(data_sets=sets), tmp_path / "run")


def test_data_sets_that_no_task_uses_are_not_opened(tmp_path, make_recipe):
    sets = make_recipe().to_dict()["data_sets"] | {"other": {"manifest": "/none/there.parquet"}}
    assert set(prepare(make_recipe(data_sets=sets), tmp_path / "run").data.num_rows) == {"pets"}


# --- run directories ---


def test_a_run_directory_may_be_absent_or_empty(tmp_path, make_recipe):
    check_run_dir(make_recipe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    check_run_dir(make_recipe(), tmp_path / "run")


def test_a_folder_of_something_else_is_refused(tmp_path, make_recipe):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RequestError, match="expected a run directory or an empty one, found other files"):
        check_run_dir(make_recipe(), tmp_path)


def test_a_run_of_another_recipe_is_refused(tmp_path, make_recipe):
    prepare(make_recipe(), tmp_path / "run")
    check_run_dir(make_recipe(train={"num_steps": 20}), tmp_path / "run")
    with pytest.raises(RequestError, match="made with seed = 0, the recipe now says 1"):
        check_run_dir(make_recipe(seed=1), tmp_path / "run")


def test_a_refused_model_leaves_the_run_directory_free(tmp_path, make_recipe):
    """The user mends the recipe and runs the same command again."""
    with pytest.raises(RequestError, match="dense"):
        prepare(make_recipe(model={"variant": "imp-s", "moe": {"num_experts": 4}}), tmp_path / "run")
    check_run_dir(make_recipe(), tmp_path / "run")
    prepare(make_recipe(), tmp_path / "run")


def test_a_kill_before_the_config_is_written_leaves_the_run_directory_free(tmp_path, make_recipe):
    """A first start may die at any moment; what it has left is no other files."""
    prepare(make_recipe(), tmp_path / "run")
    (tmp_path / "run" / "config.yaml").unlink()
    check_run_dir(make_recipe(), tmp_path / "run")


def test_a_config_that_was_not_written_to_its_end_is_one_clear_line(tmp_path, make_recipe):
    prepare(make_recipe(), tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(RequestError):
        check_run_dir(make_recipe(), tmp_path / "run")


def test_two_processes_cannot_share_a_run_directory(tmp_path):
    lock = lock_run_dir(tmp_path / "run")
    with pytest.raises(RequestError, match="another process is training there"):
        lock_run_dir(tmp_path / "run")
    lock.close()
    lock_run_dir(tmp_path / "run").close()


@pytest.mark.parametrize(("limit", "value"), [("_MOST_CAPTIONS", 8192), ("_MOST_CHARACTERS", 40_000)])
def test_a_tokenizer_learns_from_all_over_a_sorted_manifest(tmp_path, monkeypatch, limit, value):
    """The first captions of a manifest sorted by what they show are of one thing."""
    texts = [[f"thing {i // 4096}"] for i in range(5 * 4096)]
    pq.write_table(pa.table({"id": [str(i) for i in range(len(texts))], "text": texts}), tmp_path / "m.parquet")
    monkeypatch.setenv("IMP_CACHE", str(tmp_path))
    monkeypatch.setattr(prepare_module, limit, value)
    found = list(prepare_module._captions(Manifest(str(tmp_path / "m.parquet")), max_characters=100))
    assert len(set(found)) >= 2 and found[-1] == "thing 4"
    assert len(found) <= 8192
