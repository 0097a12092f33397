"""Exported models: equal to the bit, whole or absent, and one clear line for whatever is wrong with the files."""

import base64
import errno
import hashlib
import json
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model.config import ModelConfig, MoEConfig, PatchEmbedder
from model.imp import Imp
from pipeline.cli import main
from pipeline.data.tokens import grid_positions, image_tokens, patchify
from pipeline.errors import RequestError
from pipeline.export import folder as folder_of_export
from pipeline.export import load_model, read_config, save_model
from pipeline.export.hub import CODE
from pipeline.export.hub.writing import MODULES, SETTINGS_FILE

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"width": 16, "depth": 2, "num_heads": 2, "head_dim": 8, "mlp_dim": 32, "common_dim": 12, "vocab_size": 40}
MODALITIES, PAIRS = ("audio", "text", "vision"), (("audio", "text"), ("text", "vision"))
CLASSES = {"toy": ["red", "green", "blue"]}


def make_imp(**fields) -> Imp:
    config = ModelConfig(**SIZES | fields)
    modalities = (*MODALITIES, *(e.name for e in config.embedders))
    return Imp(config, modalities=modalities, pairs=PAIRS, offsets=PAIRS[1:], classifiers={"toy": 3})


@pytest.fixture(scope="module")
def imp():
    return make_imp(moe=MoEConfig(4, 1, capacity_factor=1.5), qk_norm=True)


@pytest.fixture(scope="module")
def params(imp):
    return imp.init(0)


@pytest.fixture
def folder(imp, params, tmp_path):
    save_model(tmp_path / "exported", imp, params, step=7, classes=CLASSES)
    return tmp_path / "exported"


def encode(imp: Imp):
    return jax.jit(imp.encode, static_argnums=1)


def assert_equal(first: dict, second: dict) -> None:
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape) and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"moe": MoEConfig(4, 1, placement="interleaved", group="tokens"), "towers": "per_modality"},
        {"embedders": (PatchEmbedder("depth", 64, (8, 8)), PatchEmbedder("touch", 5, (9,)))},
        {"dtype": "bfloat16", "position_scale": 0.3, "text_positions": (64,), "remat": "none"},
    ],
)
def test_what_is_loaded_is_what_was_saved(tmp_path, fields):
    imp = make_imp(**fields)
    params = imp.init(3)
    # Values that a text form or another type would change.
    odd = np.array([-0.0, 1e-42, np.nan, np.inf, np.float32(1 / 3)], np.float32)
    params["classifier_toy"]["linear"]["kernel"] = np.resize(odd, (16, 3))
    # An array whose memory is not in its own order.
    params["embed_audio"]["pre"]["kernel"] = np.asfortranarray(params["embed_audio"]["pre"]["kernel"])
    save_model(tmp_path / "out", imp, params, step=7, classes=CLASSES)
    loaded, found = load_model(tmp_path / "out")
    assert_equal(params, found)
    assert (loaded.config, loaded.groups) == (imp.config, imp.groups)
    assert (loaded.modalities, loaded.pairs, loaded.offsets) == (imp.modalities, imp.pairs, imp.offsets)
    assert loaded.classifiers == imp.classifiers


def test_files_have_the_names_and_forms_that_others_read(imp, folder):
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    arrays = load_file(folder / "model.safetensors")
    assert {a.dtype for a in arrays.values()} == {np.dtype(np.float32)}
    assert arrays["encoder/dense/attention/qkv/kernel"].shape == (1, 16, 48)
    assert arrays["pair_text_vision/tau"].shape == ()
    config = json.loads((folder / "config.json").read_text())
    assert (config["format"], config["step"], config["classifiers"]) == (2, 7, CLASSES)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert config["files"]["model.safetensors"]["sha256"] == digest
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    assert (config["pairs"], config["offsets"]) == ([list(p) for p in PAIRS], [["text", "vision"]])
    assert (config["model"]["width"], config["model"]["moe"]["capacity_factor"]) == (16, 1.5)
    assert read_config(folder).model == imp.config


def test_features_are_the_same_before_and_after(imp, params, folder):
    loaded, found = load_model(folder)
    rng = np.random.default_rng(0)
    arrays = {
        "vision": (rng.integers(0, 256, (2, 4, 768), np.uint8), rng.integers(0, 16, (2, 4, 3), np.int32)),
        "text": (rng.integers(0, 40, (2, 4), np.int32), rng.integers(0, 8, (2, 4, 1), np.int32)),
    }
    for modality, given in arrays.items():
        before, after = (encode(i)(p, modality, *given) for i, p in ((imp, params), (loaded, found)))
        assert np.asarray(before).tobytes() == np.asarray(after).tobytes()


def test_fields_that_change_no_parameter_can_be_replaced(folder, params):
    loaded, found = load_model(folder, dtype="bfloat16", attention="xla")
    assert (loaded.config.dtype, loaded.config.attention) == ("bfloat16", "xla")
    assert_equal(params, found)
    with pytest.raises(RequestError, match=r"array \S+: expected F32 \(32, 3\), found F32 \(16, 3\)"):
        load_model(folder, width=32, num_heads=4)


@pytest.mark.parametrize(
    ("tokenizer", "name"), [(b"\x0a\x0fsentencepiece", "tokenizer.model"), (b'{"model": {}}', "tokenizer.json")]
)
def test_the_tokenizer_is_named_after_its_kind(imp, params, tmp_path, tokenizer, name):
    save_model(tmp_path / "out", imp, params, step=1, classes=CLASSES, tokenizer=tokenizer)
    assert (tmp_path / "out" / name).read_bytes() == tokenizer
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_an_empty_folder_is_filled_and_one_in_use_is_left_alone(imp, params, tmp_path):
    out = tmp_path / "a" / "b"
    out.mkdir(parents=True)
    save_model(out, imp, params, step=1, classes=CLASSES)
    before = (out / "config.json").read_bytes()
    with pytest.raises(RequestError, match=r"b: expected a new or an empty folder, found (config|model)\."):
        save_model(out, imp, params, step=2, classes=CLASSES)
    assert (out / "config.json").read_bytes() == before
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="file: expected a new or an empty folder, found a file"):
        save_model(tmp_path / "file", imp, params, step=2, classes=CLASSES)
    with pytest.raises(RequestError, match="expected a place for a folder, found Not a directory"):
        save_model(tmp_path / "file" / "out", imp, params, step=2, classes=CLASSES)


def test_who_may_read_one_file_may_read_all(imp, params, tmp_path, tokenizer):
    before = os.umask(0o027)
    try:
        save_model(tmp_path / "out", imp, params, step=7, classes=CLASSES, tokenizer=tokenizer.model)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


def test_nothing_is_left_of_an_export_that_fails(imp, params, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(folder_of_export, "write_json", fail)
    with pytest.raises(OSError, match="the disk is full"):
        save_model(tmp_path / "out", imp, params, step=1, classes=CLASSES)
    assert list(tmp_path.iterdir()) == []


def test_parameters_and_classes_of_another_model_are_refused(imp, params, tmp_path):
    missing = {name: group for name, group in params.items() if name != "pair_audio_text"}
    with pytest.raises(ValueError, match=r"expected \d+ arrays, found \d+: no pair_audio_text/.* and \d+ more"):
        save_model(tmp_path / "out", imp, missing, step=1, classes=CLASSES)
    halves = jax.tree.map(lambda x: np.asarray(x, np.float16), params)
    with pytest.raises(ValueError, match=r"expected F32 \(.*\), found float16 \("):
        save_model(tmp_path / "out", imp, halves, step=1, classes=CLASSES)
    with pytest.raises(ValueError, match=r"classes: expected as many names as {'toy': 3}, found {'toy': 2}"):
        save_model(tmp_path / "out", imp, params, step=1, classes={"toy": ["red", "green"]})
    assert list(tmp_path.iterdir()) == []


def refused(folder: Path) -> str:
    """The one line that loading says."""
    with pytest.raises(RequestError) as caught:
        load_model(folder)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(str(folder))
    return line.removeprefix(f"{folder}/")


def test_missing_files(folder):
    (folder / "model.safetensors").unlink()
    found = "expected a file of the exported model, found No such file or directory; copy the exported folder again"
    assert refused(folder) == f"model.safetensors: {found}"
    (folder / "config.json").unlink()
    assert refused(folder) == "config.json: expected an exported model's config.json, found No such file or directory"


def test_a_folder_that_nothing_can_replace_is_filled_from_inside(imp, params, tmp_path, monkeypatch):
    """A link; a mount, which cannot be renamed over, whose parent may be another disk or read-only."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/.out.1-2.partial").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    moved = []

    def rename(source, target, real=os.rename):
        if Path(target) == tmp_path / "out":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(source), None, str(target))
        moved.append(Path(target).name)
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    save_model(tmp_path / "out", imp, params, step=1, classes=CLASSES)
    assert moved[-2:] == ["model.safetensors", "config.json"] and load_model(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "out"]
    assert sorted(os.listdir(tmp_path / "disk")) == [".out.1-2.partial", "config.json", "model.safetensors"]


@pytest.mark.parametrize("size", [0, 300, -1])
def test_truncated_parameters(folder, size):
    path = folder / "model.safetensors"
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:size])
    expected = f"model.safetensors: expected the {whole} bytes that were exported, found {path.stat().st_size}; copy"
    assert refused(folder).startswith(expected)


def test_a_changed_bit_is_found(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-100] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert refused(folder).startswith("model.safetensors: expected the bytes that were exported, found others; copy")


def reseal(folder: Path) -> None:
    """Makes config.json take the parameters for its own."""
    config = json.loads((folder / "config.json").read_text())
    data = (folder / "model.safetensors").read_bytes()
    config["files"]["model.safetensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("data", [b"", b"{}", b"\x80\x04cos\nsystem\n(S'exit 1'\ntR." * 20])
def test_parameters_that_are_no_safetensors(folder, data):
    (folder / "model.safetensors").write_bytes(data)
    reseal(folder)
    assert refused(folder).startswith("model.safetensors: expected a whole safetensors file, found ")


NAME = "encoder/norm/scale"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop(NAME), f": no {NAME}"),
        (lambda a: a.update(other=a[NAME]), ": unknown other"),
        (lambda a: a.update({NAME: a[NAME][:-1]}), f"array {NAME}: expected F32 (16,), found F32 (15,)"),
        (lambda a: a.update({NAME: a[NAME].astype(np.float16)}), f"array {NAME}: expected F32 (16,), found F16 (16,)"),
    ],
)
def test_other_arrays_than_the_model_has(folder, change, message):
    arrays = load_file(folder / "model.safetensors")
    number = len(arrays)
    change(arrays)
    save_file(arrays, folder / "model.safetensors")
    reseal(folder)
    line = refused(folder)
    assert message in line and line.endswith("; is it of the same export as config.json?")
    if len(arrays) != number:
        assert f"expected {number} arrays, found {len(arrays)}" in line


INPUT = {"data_set": "toy", "modality": "image", "embedder": "vision", "settings": {}, "classes": ["red"]}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 1, "expected an exported model of format 2, found format 1; export the run again with "),
        ("format", None, "expected an exported model of format 2, found format None"),
        ("step", "7", 'step: expected an integer of at least 0, found "7"'),
        ("pairs", ..., "expected the keys of format 2, found in the file no pairs"),
        ("pears", [], "expected the keys of format 2, found in the file unknown pears"),
        ("modalities", ["vision", "smell"], 'modalities: expected some of vision, audio, text, found ["vision", "sm'),
        ("pairs", [["text", "text"]], 'pairs: expected pairs of two of audio, text, vision, found [["text", "text"]]'),
        ("classifiers", {"toy": 3}, "classifiers.toy: expected a list, found 3"),
        ("pairs", [["text"]], 'pairs[0]: expected a list of 2, found ["text"]'),
        ("files", {}, "files: expected model.safetensors among them, found []"),
        ("inputs", [{"data_set": "toy"}], "found in inputs[0] no embedder, modality"),
        ("inputs", [INPUT | {"embedder": "smell"}], "inputs[0].embedder: expected one of audio, text, vision, found"),
        ("inputs", [INPUT | {"classes": ["grey"]}], "inputs[0].classes: expected names of the classifier 'toy', found"),
        ("inputs", [INPUT | {"pair": ["audio", "text"]}], "inputs[0].pair: expected a space of vision, found"),
        ("inputs", [INPUT | {"settings": None}], "inputs[0].settings: expected an object, found null"),
        ("inputs", [INPUT | {"settings": {"short_side": 0}}], "settings.short_side: expected at least 16, found 0"),
        ("inputs", [INPUT | {"text_length": -1}], "inputs[0].text_length: expected an integer of at least 0, found -1"),
        ("model", [], "model: expected an object, found []"),
        ("model.width", ..., "expected the keys of format 2, found in model no width"),
        ("model.wdth", 16, "expected the keys of format 2, found in model unknown wdth"),
        ("model.width", "16", 'model.width: expected an integer above 0, found "16"'),
        ("model.depth", -1, "model.depth: expected an integer above 0, found -1"),
        ("model.width", 24, "width 24 must be num_heads 2 x head_dim 8 = 16"),
        ("model.dtype", "int8", "dtype is 'int8'; known: auto, bfloat16, float32"),
        ("model.dtype", "auto", "data type 'auto' not understood"),
        ("model.scan", 1, "model.scan: expected a bool, found 1"),
        ("model.vision_patch", [4, 16], "model.vision_patch: expected 3 integers above 0, found [4, 16]"),
        ("model.moe.router", "oracle", "moe.router is 'oracle'; known: experts_choose, tokens_choose"),
        ("model.moe.num_experts", True, "model.moe.num_experts: expected an integer above 0, found true"),
    ],
)
def test_other_settings_than_a_model_has(folder, key, value, message):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    *outer, last = key.split(".")
    node = config
    for part in outer:
        node = node[part]
    node.pop(last) if value is ... else node.update({last: value})
    path.write_text(json.dumps(config))
    line = refused(folder)
    assert line.startswith("config.json: ") and message in line


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000])
def test_settings_that_are_no_json(folder, text):
    (folder / "config.json").write_bytes(text)
    assert refused(folder).startswith("config.json: expected JSON, found ")


def test_settings_that_a_newer_version_added_have_their_defaults(folder, imp):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["model"]["contrastive_chunk"]
    path.write_text(json.dumps(config))
    assert load_model(folder)[0].config == imp.config


def test_tokens_of_an_image(imp):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
    tokens, positions = image_tokens(pixels, imp.config)
    assert (tokens == patchify(pixels[None], (1, 16, 16))).all() and tokens.dtype == np.uint8
    assert (positions == grid_positions((1, 2, 4), (16, 32, 32))).all()
    for wrong in (pixels.astype(np.float32), pixels[..., 0], np.zeros((32, 32, 4), np.uint8)):
        with pytest.raises(ValueError, match=r"expected \(height, width, 3\) uint8 pixels, found \("):
            image_tokens(wrong, imp.config)


RECIPE = {
    "data_sets": {"photos": {"manifest": "/data/photos.parquet", "classes": ["cat", "dog"]}},
    "tasks": {
        "classes": {
            "data_set": "photos",
            "objective": "softmax",
            "modalities": ["image"],
            "batch_size": 4,
            "variants": [{"size": 32}],
        },
        "captions": {
            "data_set": "photos",
            "objective": "nce",
            "modalities": ["image", "text"],
            "batch_size": 4,
            "variants": [{"size": 32}],
        },
    },
    "train": {"num_steps": 2},
    "model": {"variant": "imp-tiny-moe", "common_dim": 16},
}


@pytest.fixture
def run_dir(tmp_path, tokenizer):
    """A run's newest checkpoint, with all it has to say of itself."""
    from model.step import init_state
    from pipeline import recipe as recipes
    from pipeline.recipe import specs
    from pipeline.train.checkpoint import Checkpoints
    from pipeline.train.devices import use_compute_type
    from pipeline.train.mixture.structures import structure_of

    recipe = recipes.from_dict(RECIPE)
    data_sets, tokens = specs.data_set_specs(recipe), specs.token_spec(recipe)
    structures = [
        structure_of(t, v, data_sets[t.data_set], tokens) for t in specs.task_specs(recipe).values() for v in t.variants
    ]
    config = use_compute_type(specs.model_config(recipe, vocab_size=tokenizer.vocab_size))
    state = init_state(Imp.for_structures(config, structures).init(5))
    checkpoints = Checkpoints(tmp_path / "run")
    data = {"config": recipe.to_dict(), "tokenizer": base64.b64encode(tokenizer.model).decode()}
    checkpoints.save(2, state=state, data=data)
    checkpoints.wait()
    return tmp_path / "run"


def test_the_job_exports_the_newest_checkpoint(run_dir, tmp_path, tokenizer, capsys):
    from pipeline.evaluate.trained_model import TrainedModel

    out = tmp_path / "exported"
    assert main(["export", "--run", str(run_dir), "--out", str(out)]) == 0
    names = {"README.md", "config.json", "model.safetensors", "selftest.safetensors", "tokenizer.model"}
    listed = ", ".join(sorted({*names, *CODE, MODULES, SETTINGS_FILE}))
    assert capsys.readouterr().out.splitlines()[-1] == f"{out}: the model of step 2 ({listed})"
    model, (imp, params) = TrainedModel(run_dir), load_model(out)
    assert_equal(model.params, params)
    assert (imp.config, imp.groups) == (model.imp.config, model.imp.groups)
    assert (read_config(out).step, read_config(out).classifiers) == (2, {"photos": ("cat", "dog")})
    assert (out / "tokenizer.model").read_bytes() == tokenizer.model
    tokens, positions = image_tokens(np.full((32, 32, 3), 90, np.uint8), imp.config)
    theirs = model.features("vision", [{"tokens": tokens, "positions": positions}])
    ours = encode(imp)(params, "vision", tokens[None], positions[None])
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


def test_the_folder_is_a_model_of_sentence_transformers_and_its_card_may_be_edited(run_dir, tmp_path):
    out = tmp_path / "exported"
    assert main(["export", "--run", str(run_dir), "--out", str(out)]) == 0
    (module,) = json.loads((out / MODULES).read_text())
    assert (module["path"], module["type"]) == ("", "modeling_imp.ImpModule")
    assert json.loads((out / SETTINGS_FILE).read_text())["similarity_fn_name"] == "dot"
    for name in CODE:
        code = (out / name).read_text()
        # It runs where the project is not installed, and a loader looks for every import statement.
        assert not re.search(r"^\s*(import|from) (pipeline|model|av|PIL|soundfile|librosa|tokenizers)\b", code, re.M)
    (out / "README.md").write_text("a card of one's own")
    load_model(out)


def test_wrong_requests_are_one_line_and_exit_2(run_dir, tmp_path, capsys):
    assert main(["export", "--run", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: --run {tmp_path}: expected a run directory with checkpoints, found none"
    assert main(["export", "--run", str(run_dir), "--out", str(run_dir)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {run_dir}: expected a new or an empty folder, found checkpoints in it"
    damaged = max((p for p in (run_dir / "checkpoints").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    assert main(["export", "--run", str(run_dir), "--out", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    name = damaged.relative_to(run_dir / "checkpoints" / "2")
    assert f"is damaged, the newest, 2, because {name} is corrupt (checksum mismatch); put back a copy" in line
