"""The door to an exported model: equal to evaluation to the bit, in any order, and clear about what it refuses."""

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from pipeline.cli import main
from pipeline.errors import RequestError
from pipeline.evaluate import measure
from pipeline.evaluate.evaluator import Evaluator
from pipeline.evaluate.measurement import measurements
from pipeline.evaluate.trained_model import TrainedModel
from pipeline.export import load, save_model
from pipeline.export.features import unit
from pipeline.export.selftest import check_selftest
from pipeline.recipe import EvaluationSettings
from tests.toy_recipe import DIGITS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run_dir(toy_run):
    return toy_run


@pytest.fixture(scope="module")
def model(run_dir):
    return TrainedModel(run_dir)


@pytest.fixture(scope="module")
def exported(run_dir):
    out = run_dir.parent / "exported"
    assert main(["export", "--run", str(run_dir), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def encoder(exported):
    return load(exported)


def files(corpus: Path, modality: str) -> list[str]:
    """The held-out files of a modality, in the order of their manifest."""
    manifest = corpus / ("digits" if modality == "image" else "moving_digits") / "held_out.parquet"
    rows = pq.read_table(manifest).to_pylist()
    return [str(manifest.parent / (row.get(modality) or row["video"])) for row in rows]


def features_of(model, entry: EvaluationSettings) -> np.ndarray:
    """(rows, clips, width) of evaluation, in the order of the manifest."""
    (measurement,) = measurements(model, entry)
    rows = Evaluator(model).rows(measurement)
    return rows.features[np.argsort(rows.numbers)]


ARGUMENTS = {"image": "images", "video": "videos", "audio": "audio"}
ENTRIES = [("digits", "zero_shot", "image", 1), ("moving", "zero_shot", "video", 2), ("moving", "classify", "audio", 3)]


@pytest.mark.parametrize(("data_set", "kind", "modality", "clips"), ENTRIES)
def test_features_are_those_of_evaluation_to_the_bit(model, encoder, toy_corpus, data_set, kind, modality, clips):
    entry = EvaluationSettings(data_set=data_set, kind=kind, modality=modality, clips=clips)
    held_out = features_of(model, entry)
    # In another order, several times over, and not by whole batches.
    paths = files(toy_corpus, modality)[::-1] * 7
    items = {ARGUMENTS[modality]: paths}
    found = encoder.embed(**items, space="features", data_set=data_set, clips=clips)[ARGUMENTS[modality]]
    assert len(paths) == 70 and np.ptp(found, axis=0).max() > 0.01
    np.testing.assert_array_equal(found[::-1], np.tile(held_out.mean(1), (7, 1)))
    alone = encoder.embed(**{ARGUMENTS[modality]: paths[:1]}, space="features", data_set=data_set, clips=clips)
    np.testing.assert_array_equal(alone[ARGUMENTS[modality]], found[:1])


def test_places_of_texts_and_pictures_are_those_of_evaluation_to_the_bit(model, encoder, toy_corpus):
    entry = EvaluationSettings(data_set="digits", kind="zero_shot", modality="image")
    texts = [f"the digit {d}" for d in DIGITS] * 7
    (measurement,) = measurements(model, entry)
    expected = unit(Evaluator(model).embed_texts(measurement.task, texts, target="vision"))
    pictures = unit(model.project(features_of(model, entry)[:, 0], source="vision", target="text"))
    found = encoder.embed(images=files(toy_corpus, "image"), texts=texts)
    np.testing.assert_array_equal(found["texts"], expected)
    np.testing.assert_array_equal(found["images"], pictures)
    cosines = encoder.similarity(texts=texts[:3], images=files(toy_corpus, "image"))
    np.testing.assert_array_equal(cosines, expected[:3] @ pictures.T)


def test_accuracies_are_those_of_evaluation(model, encoder, toy_corpus):
    """By the trained classifier over its task's classes, and by texts."""
    entries = [
        EvaluationSettings(data_set="moving", kind="classify", modality="audio", classes=DIGITS),
        EvaluationSettings(data_set="digits", kind="zero_shot", modality="image"),
    ]
    model.recipe = model.recipe.model_copy(update={"evaluate": entries})
    sound, zero_shot = (entry["metrics"]["acc1"] for entry in measure.evaluate_run(None, model))
    found = encoder.classify(audio=files(toy_corpus, "audio"))
    assert accuracy(found, toy_corpus / "moving_digits/held_out.parquet") == sound
    assert all(set(one) == set(DIGITS) and abs(sum(one.values()) - 1) < 1e-6 for one in found)
    found = encoder.zero_shot(images=files(toy_corpus, "image"), classes=DIGITS)
    assert accuracy(found, toy_corpus / "digits/held_out.parquet") == zero_shot
    assert all(list(one.values()) == sorted(one.values(), reverse=True) for one in found)


def accuracy(found: list[dict], manifest: Path) -> float:
    labels = [next(n for n in row["labels"] if n in DIGITS) for row in pq.read_table(manifest).to_pylist()]
    return sum(next(iter(one)) == label for one, label in zip(found, labels, strict=True)) / len(labels)


def features(encoder, **given) -> np.ndarray:
    (found,) = encoder.embed(space="features", **{"data_set": None} | given).values()
    return found


def test_pictures_and_arrays_give_what_their_files_give(encoder, tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 56, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    given = [tmp_path / "a.png", pixels, Image.open(tmp_path / "a.png"), Image.fromarray(pixels).convert("RGBA")]
    found = features(encoder, images=given, data_set="digits")
    assert (found == found[0]).all()
    sound = rng.normal(size=(48_000, 2)).astype(np.float32) / 8
    soundfile.write(tmp_path / "a.wav", sound, 48_000, subtype="FLOAT")
    found = features(encoder, audio=[str(tmp_path / "a.wav"), sound, sound.astype(np.float64)], sample_rate=48_000)
    assert (found == found[0]).all()
    whole = (sound * 2**15).astype(np.int16)
    soundfile.write(tmp_path / "b.wav", whole, 48_000)
    found = features(encoder, audio=[str(tmp_path / "b.wav"), whole], sample_rate=48_000)
    assert (found == found[0]).all()


def test_frames_of_an_array_are_taken_at_the_times_of_the_run(encoder):
    """The run's rate is 8 frames a second: of 24 a second every third is seen."""
    rng = np.random.default_rng(1)
    frames = rng.integers(0, 256, (24, 32, 32, 3), np.uint8)
    found = features(encoder, videos=[frames], fps=24)
    np.testing.assert_array_equal(found, features(encoder, videos=[frames[::3]], fps=8))
    assert (found != features(encoder, videos=[frames[:8]], fps=8)).any()


def test_another_size_that_was_trained(encoder, exported, toy_corpus):
    paths = files(toy_corpus, "image")[:2]
    large, small = (encoder.classify(images=paths, size=size) for size in (32, 16))
    assert large == encoder.classify(images=paths) != small
    with pytest.raises(RequestError, match="image: size=64 was not trained; known: 32x32, 16x16"):
        encoder.classify(images=paths, size=64)


def test_lists_may_be_empty_or_one_item(encoder, toy_corpus):
    (path, *_), empty = files(toy_corpus, "image"), encoder.embed(images=[], texts=[])
    assert {name: found.shape for name, found in empty.items()} == {"images": (0, 16), "texts": (0, 16)}
    assert features(encoder, images=[], data_set="digits").shape == (0, 128)
    assert encoder.classify(images=[]) == [] == encoder.zero_shot(images=[], classes=["one"])
    one, listed = (encoder.embed(texts=given, data_set="digits")["texts"] for given in ("one", ["one"]))
    assert (one == listed).all() and one.shape == (1, 16)
    assert features(encoder, images=path, data_set="digits").shape == (1, 128)


PIXELS = np.zeros((32, 32, 3), np.uint8)
FRAMES, SOUND = np.zeros((8, 32, 32, 3), np.uint8), np.zeros(9000, np.float32)


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("embed", {}, "expected at least one of images, videos, audio, texts, found none"),
        ("embed", {"images": [PIXELS], "audio": []}, "image and audio: no space was trained: 'features' gives"),
        (
            "embed",
            {"videos": [FRAMES]},
            "video: several spaces fit: space= one of audio_vision, text_vision",
        ),
        ("embed", {"audio": [], "texts": []}, "audio and text: no space was trained: 'features' gives"),
        ("embed", {"texts": ["a"], "space": "smell"}, "space: 'smell' is none of text: space= one of text_vision"),
        ("embed", {"texts": ["one"], "data_set": "x"}, "text: data_set 'x' has no such head; known: digits, moving"),
        ("embed", {"texts": ["one"]}, "text: data sets prepared it in different ways: data_set= one of digits, moving"),
        ("embed", {"images": ["no.png"]}, r"images\[0\]: missing_file: no.png"),
        (
            "embed",
            {"images": [PIXELS, "s3://a/b.png"]},
            r"images\[1\]: expected a path of this machine, found s3://a/b",
        ),
        ("embed", {"images": PIXELS}, "expected a list of items, found one array; put it into a list"),
        ("embed", {"images": [PIXELS / 255]}, r"expected \(height, width, 3\) uint8 RGB, found \(32, 32, 3\) float64"),
        ("embed", {"images": [7]}, r"images\[0\]: expected a path, a PIL image or a numpy array, found int"),
        ("embed", {"images": [PIXELS], "clips": 0}, "clips: expected a number of at least 1, found 0"),
        ("embed", {"texts": [" "], "data_set": "digits"}, r"texts\[0\]: no_text: no tokens in ' '"),
        ("embed", {"texts": [b"a"], "data_set": "digits"}, r"texts\[0\]: expected a str, found bytes"),
        ("embed", {"media": {"smell": [1]}}, "smell: no space was trained"),
        ("classify", {"videos": [FRAMES]}, "video: no classifier was trained on it; zero_shot takes classes"),
        ("classify", {"images": [PIXELS], "classes": ["cat"]}, "classes: expected some of zero, one, two, three and 6"),
        ("classify", {"audio": [SOUND]}, r"audio\[0\]: expected sample_rate=, the samples per second of an array"),
        ("classify", {"audio": [SOUND + 9999], "sample_rate": 16000}, "expected finite samples from -1 to 1"),
        ("zero_shot", {"videos": [FRAMES], "classes": ["a"]}, r"videos\[0\]: expected fps=, the frames per second"),
        ("zero_shot", {"images": [PIXELS], "classes": []}, "classes: expected names, found none"),
        ("zero_shot", {"images": [PIXELS], "classes": ["one", " "]}, "classes: expected names, found 'one', ' '"),
        ("zero_shot", {"images": [PIXELS], "classes": "one"}, "expected a list of names, found the text 'one'"),
        ("zero_shot", {"images": [PIXELS], "classes": ["one", "one"]}, "different names, found 'one' more than once"),
        ("classify", {"images": [PIXELS], "classes": ["one", "one"]}, "different names, found 'one' more than once"),
        *(
            ("zero_shot", {"images": [PIXELS], "classes": ["one"], "prompts": prompts}, f"in place of .* found {found}")
            for prompts, found in (
                ("a photo", "'a photo'"),
                (["{}", "{a}"], "'{a}'"),
                (["{}{}"], "'{}{}'"),
                ([], "none"),
            )
        ),
        ("similarity", {"images": [PIXELS]}, "similarity: expected two kinds of input in a common space, found images"),
    ],
)
def test_wrong_requests_are_one_line(encoder, method, given, message):
    with pytest.raises(RequestError, match=message) as caught:
        getattr(encoder, method)(**given)
    assert "\n" not in str(caught.value)


# Whoever imports these fails.
BARRED = ("ray", "pyarrow", "pydantic", "orbax", "annotated_types", "pipeline.train", "pipeline.recipe")


def test_what_is_not_installed_is_not_needed_and_named_where_it_is(exported, toy_corpus):
    """Only what a file is decoded with may be missing, and only files of that kind need it."""
    paths = [files(toy_corpus, m)[0] for m in ("image", "video", "audio")]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({BARRED}))
import builtins, importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in ("PIL", "av", "soundfile") else real(name, *a)
from pipeline.export import load
assert not {{"PIL", "av", "soundfile", "soxr", "librosa"}} & set(sys.modules)
encoder = load({str(exported)!r})
print(encoder.embed(texts=["one"], data_set="digits")["texts"].shape)
for given in ({{"images": {paths[0]!r}}}, {{"videos": {paths[1]!r}}}, {{"audio": {paths[2]!r}}}):
    try:
        encoder.embed(space="features", **given, data_set="digits" if "images" in given else None)
    except ValueError as e:
        print(e)
    except Exception as e:
        print(type(e).__name__, e)
"""
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shape, *lines = done.stdout.splitlines()
    assert shape == "(1, 16)"
    found = [re.search(r"need the package (\S+), which is not installed: pip install", line)[1] for line in lines]
    assert found == ["pillow", "pillow", "soundfile"]


def test_a_modality_of_the_recipe_needs_its_description(encoder):
    """An export names no code: who loads it does."""
    from pipeline.export.encoder import Encoder
    from pipeline.export.inputs import Input
    from tests.depth import DEPTH_AS_VISION

    settings = {"max_mm": 500, "size": [32, 32], "max_bytes": 1 << 20}
    own = next(one for one in encoder.config.inputs if one.modality == "image" and one.pair)
    own = dataclasses.replace(own, modality="depth", data_set="rooms", settings=settings)
    assert isinstance(own, Input)
    config = dataclasses.replace(encoder.config, inputs=(*encoder.config.inputs, own))
    with pytest.raises(RequestError, match=r'depth: the recipe added this modality: .* load\(..., modalities={"depth"'):
        Encoder(encoder.model, config, None, {}).embed(media={"depth": [PIXELS]})
    known = Encoder(encoder.model, config, None, {"depth": DEPTH_AS_VISION})
    found = known.embed(media={"depth": [PIXELS + 9]})["depth"]
    np.testing.assert_array_equal(found, encoder.embed(images=[PIXELS + 9], space="text_vision")["images"])


@pytest.fixture
def copy(exported, tmp_path):
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def rewrite_selftest(folder: Path, change, **place: str) -> None:
    """Changes the arrays of a self-test and the place that computed them, with a digest that fits."""
    path, config = folder / "selftest.safetensors", json.loads((folder / "config.json").read_text())
    with safe_open(path, framework="numpy") as file:
        there = json.loads(file.metadata()["place"]) | place
    arrays = {name: array.copy() for name, array in load_file(path).items()}
    change(arrays)
    save_file(arrays, path, {"place": json.dumps(there)})
    data = path.read_bytes()
    config["files"][path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_machine_that_comes_to_other_embeddings_is_told_which_and_by_how_much(copy, encoder):
    check_selftest(copy, encoder)
    arrays = load_file(copy / "selftest.safetensors")
    spaces = {name.removeprefix("embedding/") for name in arrays if name.startswith("embedding/")}
    found = {"image/text_vision", "video/text_vision", "video/audio_vision", "audio/audio_vision", "text/text_vision"}
    assert spaces == found | {f"{name}/features" for name in ("image", "video", "audio", "text")}

    def nudge(arrays: dict) -> None:
        arrays["embedding/audio/audio_vision"][3] += 1e-5

    rewrite_selftest(copy, nudge)
    with pytest.raises(RequestError, match=r"differ on the same kind of machine: audio in audio_vision by \d\.\de-05$"):
        check_selftest(copy, encoder)
    # Elsewhere that is rounding, and other channels are not.
    rewrite_selftest(copy, lambda arrays: None, jax="0.0.1")
    check_selftest(copy, encoder)
    rewrite_selftest(copy, lambda arrays: arrays.update({"input/image": arrays["input/image"][..., ::-1].copy()}))
    with pytest.raises(RequestError, match=r"more than the 0.001 allowed .*: image in features by .*; image in text_v"):
        check_selftest(copy, encoder)


def test_an_export_without_its_selftest_is_not_whole(copy):
    (copy / "selftest.safetensors").unlink()
    with pytest.raises(RequestError, match=r"selftest.safetensors: expected a file of the exported model"):
        load(copy)


def test_an_export_without_preparations_says_so(exported, encoder, tmp_path):
    save_model(tmp_path / "bare", encoder.model.imp, encoder.model.params, step=1, classes=encoder.config.classifiers)
    bare = load(tmp_path / "bare")
    with pytest.raises(RequestError, match="image: the model was trained on inputs that it does not name"):
        bare.embed(images=[PIXELS], space="features")
    with pytest.raises(RequestError, match=r"expected the self-test of an exported model, found"):
        load(tmp_path / "bare", verify=True)
