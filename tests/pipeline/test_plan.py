"""From a recipe to a run as plain data: what is read, what is refused, and that nothing is written."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.columns import needed_columns
from pipeline.data.shard_index import FORMAT
from pipeline.errors import RequestError
from pipeline.plan import plan
from pipeline.train.mixture.schedule import START


def test_a_recipe_becomes_plain_data_and_nothing_is_written(tmp_path, make_pet_recipe):
    recipe = make_pet_recipe(seed=5)
    spec = plan(recipe, tmp_path / "run")
    assert spec.recipe == recipe.to_dict() and spec.run_dir == str(tmp_path / "run")
    assert spec.data.num_rows == {"pets": 30} and (spec.mixture.seed, spec.mixture.num_steps) == (5, 10)
    assert list(spec.data.tasks) == ["pet_text"] and spec.data.tokenizer and spec.model.vocab_size > 16
    assert (spec.placement.expert_parallel, spec.placement.fsdp) == (1, False)
    assert spec.schedule(START).batches_before(10) == {"pet_text": 10}
    assert not (tmp_path / "run").exists()


def test_a_plan_without_a_run_directory_has_no_checkpoints(make_pet_recipe):
    spec = plan(make_pet_recipe())
    assert spec.run_dir == "" and spec.data.tokenizer
    with pytest.raises(ValueError, match="no run directory"):
        spec.open_checkpoints()


def test_logging_as_plain_data(tmp_path, make_pet_recipe):
    logging = plan(make_pet_recipe(), tmp_path / "default").logging
    assert (logging.writers, logging.project, logging.profile_steps, logging.peak_flops) == (
        ("tensorboard",),
        "imp",
        None,
        None,
    )
    assert "decode pets once" in logging.feed_advice["pet_text"]
    asked = {"writers": [], "project": "x", "profile_steps": [3, 5], "peak_tflops": 1.5, "progress": "none"}
    logging = plan(make_pet_recipe(logging=asked), tmp_path / "asked").logging
    assert (logging.writers, logging.project, logging.profile_steps, logging.peak_flops, logging.progress) == (
        (),
        "x",
        (3, 5),
        1.5e12,
        "none",
    )


def test_a_writer_that_is_not_installed_is_a_wrong_request(tmp_path, make_pet_recipe, monkeypatch):
    monkeypatch.setattr("pipeline.train.telemetry.writers._importable", lambda name: name == "tensorboard")
    with pytest.raises(RequestError) as caught:
        plan(make_pet_recipe(logging={"writers": ["tensorboard", "mlflow"]}), tmp_path / "run")
    assert str(caught.value) == (
        "logging.writers: mlflow is not installed; run pip install 'imp-pretrain[mlflow]', or leave it out"
    )
    assert not (tmp_path / "run").exists()


def test_how_parameters_lie_over_devices_reaches_the_run(tmp_path, make_pet_recipe):
    spec = plan(make_pet_recipe(cluster={"expert_parallel": 2, "fsdp": True}), tmp_path / "run")
    assert (spec.placement.expert_parallel, spec.placement.fsdp) == (2, True)


def test_a_row_without_an_id_is_a_wrong_request(tmp_path, make_pet_recipe, write_manifest, pet_rows):
    rows = write_manifest(tmp_path / "m.parquet", [*pet_rows[:7], pet_rows[7] | {"id": None}, *pet_rows[8:]])
    with pytest.raises(RequestError, match="row 7: expected an id, found null"):
        plan(make_pet_recipe(rows=rows), tmp_path / "run")


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
def test_columns_a_task_reads(make_data_set, make_task, fields, has, columns):
    found = needed_columns(make_task(**fields), make_data_set(), has=has)
    assert set(found) == columns and set(found.values()) == {"task toy_task"}


def test_a_missing_column_is_named(tmp_path, make_pet_recipe, write_manifest, pet_rows):
    rows = write_manifest(tmp_path / "few.parquet", pet_rows, columns=["id", "image"])
    with pytest.raises(RequestError, match=r"expected column 'text' \(needed by task pet_text\); found id, image"):
        plan(make_pet_recipe(rows=rows), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("column", "values"),
    [("text", [f"a cat number {i}" for i in range(30)]), ("labels", ["cat"] * 30), ("id", list(range(30)))],
)
def test_a_column_of_another_type_is_a_wrong_request(tmp_path, make_pet_recipe, column, values, pet_rows, pet_task):
    """One string is not a list of strings: taken as one, a caption would be its letters."""
    table = {name: [row[name] for row in pet_rows] for name in pet_rows[0]} | {column: values}
    pq.write_table(pa.table(table), tmp_path / "typed.parquet")
    task = pet_task | {"positives": "labels"}
    with pytest.raises(RequestError, match=column):
        plan(make_pet_recipe(rows=str(tmp_path / "typed.parquet"), task=task), tmp_path / "run")


def test_rows_of_shards_are_counted(tmp_path, make_pet_recipe):
    (tmp_path / "shards").mkdir()
    index = {"format": FORMAT, "fingerprint": {"num_rows": 9}}
    (tmp_path / "shards" / "index.json").write_text(json.dumps(index))
    sets = {"pets": make_pet_recipe().to_dict()["data_sets"]["pets"] | {"shards": str(tmp_path / "shards")}}
    assert plan(make_pet_recipe(data_sets=sets), tmp_path / "run").data.num_rows == {"pets": 9}
    (tmp_path / "shards" / "index.json").write_text(json.dumps(index | {"fingerprint": {"num_rows": 0}}))
    with pytest.raises(RequestError, match=r"data_sets\.pets\.shards: .* has no rows"):
        plan(make_pet_recipe(data_sets=sets), tmp_path / "run")


def test_data_sets_that_no_task_uses_are_not_opened(tmp_path, make_pet_recipe):
    sets = make_pet_recipe().to_dict()["data_sets"] | {"other": {"manifest": "/none/there.parquet"}}
    assert set(plan(make_pet_recipe(data_sets=sets), tmp_path / "run").data.num_rows) == {"pets"}
