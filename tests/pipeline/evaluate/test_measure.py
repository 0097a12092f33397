"""Measurements of a held-out manifest: the windows of its clips, and the averages over them."""

import dataclasses
import types
from pathlib import Path

import numpy as np
import pytest

from pipeline.cli.evaluate_command import _place
from pipeline.data.modalities import EMBEDDERS
from pipeline.data.sources import MediaSource
from pipeline.data.spec import AudioSpec, TokenSpec, Variant, VideoSpec
from pipeline.data.tokens import spectrogram_tokens
from pipeline.errors import RequestError
from pipeline.evaluate import kinds
from pipeline.evaluate import measure as run
from pipeline.export import features
from pipeline.recipe import EvaluationSettings
from pipeline.recipe.settings import ClusterSettings

CLASSES = ("red", "green", "blue")
VARIANT = Variant(name="8x32x32", global_batch_size=4, num_frames=8, size=32, grid=(2, 2, 2), num_vision_tokens=8)
NUM_ROWS, BAD = 4, 2


def stand_in(values: np.ndarray) -> np.ndarray:
    """Fake features of these values."""
    return np.array([values.mean(), values.min(), values.max()], np.float32) / 64


class FakeModel:
    """A model whose features are the mean, the least and the largest value of a sample's tokens; nothing is linear."""

    step = 7
    fewer_dims = ()
    imp = types.SimpleNamespace(config=types.SimpleNamespace(heads="per_pair"))

    def __init__(self, data_set, tasks, evaluate, tokenizer):
        self.data_sets = {data_set.name: data_set}
        self.tasks = {t.name: t for t in tasks}
        self.recipe = types.SimpleNamespace(evaluate=evaluate, cluster=ClusterSettings())
        self.embedders = EMBEDDERS
        self.tokenizer, self.tokens, self.seen = tokenizer, TokenSpec(), []

    def features(self, modality: str, samples: list[dict]) -> np.ndarray:
        self.seen.append((modality, len(samples)))
        return np.stack([stand_in(s["tokens"]) for s in samples])

    def project(self, features: np.ndarray, *, source: str, target: str) -> np.ndarray:
        return np.sin(features + (source == "text"))

    def logits(self, features: np.ndarray, data_set: str) -> np.ndarray:
        return np.cos(features)


@pytest.fixture(scope="module")
def films(tmp_path_factory, write_video, write_manifest, make_data_set):
    """Rows that start at different times of a video with sound, one of them damaged: 16 frames, a view takes 8."""
    folder = tmp_path_factory.mktemp("films")
    for number in range(NUM_ROWS):
        write_video(folder / f"{number}.mp4", num_frames=72, sound_hz=500 * (number + 1))
    (folder / f"{BAD}.mp4").write_bytes(b"damaged")
    rows = [
        {
            "id": str(n),
            "video": f"{n}.mp4",
            "text": ["a cat", "the dog"][: 1 + n % 2],
            "labels": [CLASSES[n % 3]],
            "start_s": n / 8,
        }
        for n in range(NUM_ROWS)
    ]
    manifest = write_manifest(folder / "held_out.parquet", rows)
    return make_data_set(
        manifest,
        held_out={"held_out": manifest},
        classes=CLASSES,
        video=VideoSpec(fps=8.0, short_side=32, max_frames=16),
        audio=AudioSpec(frame_length=256, hop_length=128, num_frames=32, num_mels=32),
    )


@pytest.fixture
def make_model(films, make_task, tokenizer):
    def make(*entries: dict) -> FakeModel:
        tasks = [
            make_task(name="classes", modalities=("video",), variants=(VARIANT,)),
            make_task(name="text", objective="nce", modalities=("video", "text"), variants=(VARIANT,), text_length=8),
            make_task(name="sound", modalities=("audio",), variants=(Variant("all", 4),)),
        ]
        evaluate = [EvaluationSettings(**{"data_set": "toy", "modality": "video"} | e) for e in entries]
        return FakeModel(films, tasks, evaluate, tokenizer)

    return make


@pytest.fixture
def scored(monkeypatch):
    """The inputs of the metrics, in order."""
    out = []
    for name in ("classification", "retrieval"):
        real = getattr(kinds, name)
        monkeypatch.setattr(kinds, name, lambda *args, real=real, **more: (out.append(args), real(*args, **more))[1])
    return out


def good_clips(films, modality: str) -> list[np.ndarray]:
    source = MediaSource(films, modalities=(modality,))
    return [source.clip(row).media[modality] for row in range(NUM_ROWS) if row != BAD]


def expected_features(films, starts: list[int]) -> np.ndarray:
    """(rows, clips, 3) of the video windows that start at these of the 16 frames."""
    return np.stack([[stand_in(v[s : s + 8]) for s in starts] for v in good_clips(films, "video")])


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


STARTS = {1: [4], 2: [0, 8], 3: [0, 4, 8]}


@pytest.mark.parametrize("clips", [1, 2, 3])
def test_logits_are_averaged_over_clips(films, make_model, scored, clips):
    (entry,) = run.evaluate_run(None, make_model({"kind": "classify", "clips": clips}))
    expected = np.cos(expected_features(films, STARTS[clips])).mean(1)
    np.testing.assert_allclose(scored[0][0], expected, rtol=1e-4, atol=1e-4)
    assert scored[0][1].tolist() == [0, 1, 0]
    assert (entry["clips"], entry["num_examples"], entry["num_rejected"]) == (clips, 3, 1)


@pytest.mark.parametrize("clips", [1, 3])
def test_cosines_are_averaged_over_clips(films, make_model, scored, clips):
    prompts = ["a {}", "the {}"]
    model = make_model({"kind": "zero_shot", "clips": clips, "prompts": prompts})
    (entry,) = run.evaluate_run(None, model)
    ids = [[model.tokenizer.encode(p.format(c), 8) for p in prompts] for c in CLASSES]
    anchors = unit(unit(np.sin(np.array([[stand_in(i) for i in row] for row in ids]) + 1)).mean(1))
    media = unit(np.sin(expected_features(films, STARTS[clips])))
    np.testing.assert_allclose(scored[0][0], (media @ anchors.T).mean(1), rtol=1e-4, atol=1e-4)
    assert entry["clips"] == clips


@pytest.mark.parametrize("clips", [1, 3])
def test_embeddings_are_averaged_over_clips_before_they_are_ranked(films, make_model, scored, clips):
    (entry,) = run.evaluate_run(None, make_model({"kind": "retrieval", "clips": clips}))
    media, texts, (_, owners), names = scored[0]
    expected = unit(np.sin(expected_features(films, STARTS[clips])).mean(1))
    np.testing.assert_allclose(media, expected, rtol=1e-4, atol=1e-4)
    # Rows 0, 1 and 3 have one, two and two texts, each the key of itself.
    cat, dog = frozenset(["a cat"]), frozenset(["the dog"])
    assert owners == [cat, cat, dog, cat, dog] and texts.shape == (5, 3) and names == ("video", "text")
    assert (entry["clips"], entry["num_examples"]) == (clips, 3)


def test_sound_alone_has_windows_over_its_waveform(films, make_model, scored):
    """The canonical waveform is longer than a spectrogram; one clip is its start."""
    entries = [{"kind": "classify", "modality": "audio", "clips": clips} for clips in (1, 4)]
    run.evaluate_run(None, make_model(*entries))
    one, four = (args[0] for args in scored)
    for sound, found_one, found_four in zip(good_clips(films, "audio"), one, four, strict=True):
        spare = len(sound) - films.audio.num_samples
        views = [
            stand_in(spectrogram_tokens(sound[s:], films.audio)) for s in np.linspace(0, spare, 4).round().astype(int)
        ]
        np.testing.assert_allclose(found_one, np.cos(views[0]), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found_four, np.cos(views).mean(0), rtol=1e-4, atol=1e-4)


def test_entries_with_other_clips_do_not_share_their_features(make_model, scored):
    entries = [{"kind": "classify", "clips": 1}, {"kind": "classify", "clips": 3}, {"kind": "retrieval", "clips": 3}]
    model = make_model(*entries)
    assert [e["clips"] for e in run.evaluate_run(None, model)] == [1, 3, 3]
    # Three good rows: 3 views, then 9 that two entries share.
    assert [n for modality, n in model.seen if modality == "vision"] == [3, 9]
    assert not np.allclose(scored[0][0], scored[1][0])


def test_views_wait_for_the_model_a_batch_at_a_time(make_model, scored, monkeypatch):
    whole, parts = make_model({"kind": "classify", "clips": 3}), make_model({"kind": "classify", "clips": 3})
    run.evaluate_run(None, whole)
    monkeypatch.setattr(features, "BATCH", 4)
    run.evaluate_run(None, parts)
    assert [n for _, n in whole.seen] == [9] and [n for _, n in parts.seen] == [4, 4, 1]
    assert (scored[0][0] == scored[1][0]).all()


# --- without a list, what the tasks make possible ---

PAIR = {"modalities": ("video", "text"), "variants": (VARIANT,), "text_length": 8}


@pytest.mark.parametrize(
    ("fields", "kinds"),
    [
        ({"modalities": ("video",)}, ["classify"]),
        ({"modalities": ("video",), "weight": 0.0}, []),
        ({"modalities": ("video",), "objective": "sigmoid"}, ["classify"]),
        (PAIR | {"objective": "nce"}, ["retrieval"]),
        (PAIR | {"objective": "sigmoid_pairs", "text": "labels"}, ["zero_shot"]),
        (PAIR | {"objective": {"nce": 1.0, "softmax": 0.5}, "text": "labels"}, ["classify", "zero_shot"]),
        (PAIR | {"objective": {"nce": 1.0, "sigmoid": 0.5}}, ["classify", "retrieval"]),
        (PAIR | {"objective": "nce", "modalities": ("video", "audio", "text")}, ["retrieval"] * 3),
    ],
)
def test_measurements_follow_from_the_objectives(films, make_task, tokenizer, fields, kinds):
    model = FakeModel(films, [make_task(**({"variants": (VARIANT,)} | fields))], [], tokenizer)
    found = run.default_list(model)
    assert [(e.kind, e.data_set) for e in found] == [(kind, "toy") for kind in kinds]
    assert {"text"} | {e.modality for e in found} <= {"text", *fields["modalities"]}


def test_a_task_of_two_terms_serves_both_measurements(films, make_task, tokenizer, scored):
    both = make_task(objective={"nce": 1.0, "softmax": 0.5}, text="labels", **PAIR)
    model = FakeModel(films, [both], [], tokenizer)
    assert [e["task"] for e in run.evaluate_run(None, model)] == ["classify_video", "zero_shot_video"]
    # The features of three good rows, once.
    assert [n for modality, n in model.seen if modality == "vision"] == [3]


def test_nothing_that_can_be_read_is_an_error(make_model, films, tmp_path, write_manifest):
    (tmp_path / "a.mp4").write_bytes(b"damaged")
    manifest = write_manifest(tmp_path / "m.parquet", [{"id": "a", "video": "a.mp4", "labels": ["red"]}])
    model = make_model({"kind": "classify"})
    model.data_sets["toy"] = dataclasses.replace(films, held_out={"held_out": manifest})
    with pytest.raises(RequestError, match="none of the 1 rows"):
        run.evaluate_run(None, model)


def test_results_of_two_manifests_of_one_name_lie_beside_each_other(tmp_path):
    def place(manifest: str) -> Path:
        return _place(tmp_path, [{"dataset": "test", "task": "knn_image", "manifest": manifest}])

    first = place("/a/test.parquet")
    assert first.name == "test-knn_image.json"
    first.write_text('[{"manifest": "/a/test.parquet"}]')
    second = place("/b/test.parquet")
    assert place("/a/test.parquet") == first != second == place("/b/test.parquet") != place("/c/test.parquet")
    first.write_text("[")
    assert place("/a/test.parquet") != first
