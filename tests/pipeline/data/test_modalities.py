"""A modality that a recipe adds, from its manifest column to the model's inputs."""

import dataclasses
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from model.imp import Imp
from pipeline import recipe as recipes
from pipeline.data.batches import BatchMaker, SampleMaker
from pipeline.data.blocks import bytes_of_row
from pipeline.data.known_rejects import NONE_KNOWN
from pipeline.data.manifest import Manifest
from pipeline.data.modalities import EMBEDDERS, MEDIA, MODALITIES, load, load_modality
from pipeline.data.plan import TaskPlan, group_arrays
from pipeline.data.sample_tokens import View
from pipeline.data.shards import ShardSource, decode_settings, encode_rows, write_shard
from pipeline.data.sources import MediaSource
from pipeline.data.stream_spec import StreamSpec
from pipeline.errors import RequestError
from pipeline.recipe import specs
from pipeline.train.mixture.structures import structure_of
from tests.depth import DEPTH, DepthSpec

NUM_ROWS, BAD = 6, 4


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> str:
    """Rows of a depth map and a picture; one map has 8 bits."""
    folder = tmp_path_factory.mktemp("rooms")
    rng = np.random.default_rng(0)
    for number in range(NUM_ROWS):
        depth = rng.integers(0, 2000, (40, 32)).astype(np.uint8 if number == BAD else np.uint16)
        Image.fromarray(depth).save(folder / f"{number}-depth.png")
        Image.new("RGB", (32, 32), (number, 0, 0)).save(folder / f"{number}.png")
    names = [f"id-{n}" for n in range(NUM_ROWS)]
    paths = {"depth": [f"{n}-depth.png" for n in range(NUM_ROWS)], "image": [f"{n}.png" for n in range(NUM_ROWS)]}
    pq.write_table(pa.table({"id": names, **paths, "labels": [["x"]] * NUM_ROWS}), folder / "m.parquet")
    return str(folder / "m.parquet")


def make_recipe(manifest: str, *, registration: str = "tests.depth:DEPTH", media: dict | None = None, **task):
    task = {"modalities": ["image", "depth"], "objective": "nce", "batch_size": 2, "variants": [{"size": 32}]} | task
    return recipes.from_dict(
        {
            "modalities": {"depth": registration},
            "data_sets": {"rooms": {"manifest": manifest, "classes": ["x"], "media": media or {}}},
            "tasks": {"rooms": {"data_set": "rooms", **task}},
            "train": {"num_steps": 3},
        }
    )


def test_the_table_names_what_is_there():
    assert MEDIA == ("image", "video", "audio")
    assert EMBEDDERS == {"image": "vision", "video": "vision", "audio": "audio", "text": "text"}
    for modality in MODALITIES.values():
        for name in (modality.decode, modality.settings, modality.tokens):
            assert callable(load(name))


def test_samples_of_an_added_modality(manifest):
    recipe = make_recipe(manifest, media={"depth": {"max_mm": 2000}})
    task, data_set = specs.task_specs(recipe)["rooms"], specs.data_set_specs(recipe)["rooms"]
    assert pickle.loads(pickle.dumps((task, data_set))) == (task, data_set)
    assert data_set.settings("depth") == DepthSpec(max_mm=2000) and task.pairs == ("depth_vision",)
    source = MediaSource(data_set, modalities=task.media)
    plan = TaskPlan(task, seed=0, num_rows=NUM_ROWS, num_batches=4)
    samples = SampleMaker(task, data_set, tokenizer=None, tokens=specs.token_spec(recipe))
    maker, rows = BatchMaker(plan, samples, source), []
    for index in range(4):
        rows.append(maker.row(index, rank=0, world_size=1))
        for sample_id, tokens in zip(rows[-1].ids, rows[-1].arrays["depth/tokens"], strict=True):
            with Image.open(source.manifest.row(int(sample_id[-1]))["depth"]) as image:
                depth = np.asarray(image, np.float32)[:32] / 2000
            # Four rows and four columns of patches of 8 x 8.
            expected = [depth[y : y + 8, x : x + 8].ravel() for y in range(0, 32, 8) for x in range(0, 32, 8)]
            assert (tokens == np.stack(expected)).all()
    reject = next(r for row in rows for r in row.rejects)
    assert (reject["id"], reject["reason"]) == (f"id-{BAD}", "not_decodable")
    assert "expected a 16-bit PNG" in reject["detail"] and f"{BAD}-depth.png" in reject["source"]
    structure = structure_of(task, task.variants[0], data_set, specs.token_spec(recipe))
    shapes, found = structure.batch_shapes(), group_arrays(rows[0].arrays)
    for part in ("vision", "depth"):
        for name, array in found[part].items():
            assert (array.shape, array.dtype) == (shapes[part][name].shape, shapes[part][name].dtype)
    imp = Imp.for_structures(
        dataclasses.replace(specs.model_config(recipe, vocab_size=16), dtype="float32"), [structure]
    )
    assert {"embed_depth", "embed_vision", "pair_depth_vision"} < set(imp.groups)
    assert imp.shapes()["embed_depth"]["patch"]["linear"]["kernel"].shape[0] == 64


def test_an_added_modality_may_share_the_layers_of_vision(manifest):
    recipe = make_recipe(
        manifest, registration="tests.depth:DEPTH_AS_VISION", modalities=["depth"], objective="softmax"
    )
    task, data_set = specs.task_specs(recipe)["rooms"], specs.data_set_specs(recipe)["rooms"]
    clip = MediaSource(data_set, modalities=("depth",)).clip(0)
    maker = SampleMaker(task, data_set, tokenizer=None, tokens=specs.token_spec(recipe))
    arrays = maker.arrays(clip, View(task.variants[0]))
    assert arrays["vision/tokens"].shape == (4, 768) and arrays["vision/tokens"].dtype == np.uint8
    assert structure_of(task, task.variants[0], data_set, specs.token_spec(recipe)).inputs[0].modality == "vision"


def test_shards_hold_added_modalities(manifest, tmp_path):
    data_set = specs.data_set_specs(make_recipe(manifest))["rooms"]
    source = MediaSource(data_set, modalities=("image", "depth"))
    table, rejects = encode_rows(source, range(NUM_ROWS))
    index = {"format": 3, "modalities": ["image", "depth"], "settings": decode_settings(data_set)}
    index["shards"] = [write_shard(table, tmp_path / "shard-00000.arrow")]
    (tmp_path / "index.json").write_text(json.dumps(index | {"fingerprint": source.fingerprint}))
    assert [r["id"] for r in rejects] == [f"id-{BAD}"]

    def shards(**media) -> ShardSource:
        raw = make_recipe(manifest, media=media).to_dict()
        raw["data_sets"]["rooms"]["shards"] = str(tmp_path)
        return ShardSource(specs.data_set_specs(recipes.from_dict(raw))["rooms"], modalities=("depth",))

    assert (shards().clip(1).media["depth"] == source.clip(1).media["depth"]).all()
    with pytest.raises(RequestError, match=r"data_sets\.rooms\.depth: the shards .* were made with \[1000, "):
        shards(depth={"max_mm": 5})


def test_the_column_of_an_added_modality_is_read_whatever_was_copied_before(manifest, monkeypatch):
    """Also from the copy of a large manifest."""
    monkeypatch.setattr("pipeline.data.row_table._IN_MEMORY_ROWS", 0)
    assert "depth" not in Manifest(manifest).row(0)
    assert Manifest(manifest, media=("depth",)).row(0)["depth"].endswith("/0-depth.png")
    assert Manifest(manifest, media=("depth",)).fingerprint == Manifest(manifest).fingerprint


def test_blocks_of_a_stream_count_added_modalities(manifest):
    """16 patches of 64 float32 values a sample, and two samples a batch."""
    recipe = make_recipe(manifest, modalities=["depth"], objective="softmax", variants=[])
    task, data_set = specs.task_specs(recipe)["rooms"], specs.data_set_specs(recipe)["rooms"]
    counts = {"seed": 0, "start": 0, "stop": 1, "share": 1.0, "cache_bytes": 0}
    known = {"tokenizer": None, "fingerprint": {}, "known_bad": NONE_KNOWN}
    spec = StreamSpec(task=task, data_set=data_set, tokens=specs.token_spec(recipe), **counts, **known)
    assert bytes_of_row(spec) == 2 * 16 * 64 * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"registration": "tests.depth:NONE"}, "modalities.depth: expected package.module:name, found 'tests.depth:NO"),
        (
            {"registration": "tests.depth:decode"},
            "modalities.depth: expected a pipeline.data.modalities.Modality, ",
        ),
        ({"media": {"depth": {"max_m": 5}}}, "data_sets.rooms.media.depth: unknown key 'max_m'; known: max_mm, size"),
        ({"media": {"dept": {}}}, "data_sets.rooms.media: unknown name 'dept'; did you mean 'depth'?"),
        ({"modalities": ["image", "dept"]}, "tasks.rooms.modalities.1: unknown name 'dept'; did you mean 'depth'?"),
        (
            {"registration": "tests.depth:DEPTH_AS_VISION"},
            "tasks.rooms.modalities: expected different ones, and image or video, not both; found",
        ),
    ],
)
def test_a_wrong_registration_is_one_line(manifest, changes, message):
    with pytest.raises(RequestError) as caught:
        specs.data_set_specs(make_recipe(manifest, **changes))
    assert str(caught.value).startswith(message)


def test_names_of_modalities_are_new(manifest):
    raw = make_recipe(manifest).to_dict()
    for name in ("image", "vision", "text", "a b"):
        with pytest.raises(RequestError, match=f"modalities.{name}: expected a new name"):
            recipes.from_dict(raw | {"modalities": {name: "tests.depth:DEPTH"}})
    assert load_modality("tests.depth:DEPTH") is DEPTH


def test_a_resume_may_add_a_modality_with_the_mixture(manifest):
    new = make_recipe(manifest).to_dict()
    classes = new["tasks"]["rooms"] | {"modalities": ["image"], "objective": "softmax", "positives": None}
    old = recipes.from_dict(new | {"modalities": {}, "tasks": {"classes": classes}}).to_dict()
    new = recipes.from_dict(new | {"tasks": {"classes": classes, "rooms": new["tasks"]["rooms"]}}).to_dict()
    with pytest.raises(RequestError, match="allow it with --set resume"):
        recipes.check_resume(old, new)
    allowed = new | {"resume": {"allow_mixture_change": True}}
    assert recipes.check_resume(old, allowed) == ["modalities.depth is new", "tasks.rooms is new"]
