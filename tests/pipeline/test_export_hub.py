"""The PyTorch model in an exported folder: tokens as evaluation makes them, and vectors equal to jax's."""

import dataclasses
import importlib.util
import shutil
import sys

import numpy as np
import pytest
import soundfile
from PIL import Image

from model.config import ModelConfig
from pipeline.data.media import audio, container, image
from pipeline.data.modalities import MODALITIES
from pipeline.data.sample_tokens import View, evaluation_tokens
from pipeline.data.spec import AUDIO_PRESETS, AudioSpec, ImageSpec, TokenSpec, Variant, VideoSpec
from pipeline.data.tokenizer import Tokenizer
from pipeline.data.tokens import log_mel
from pipeline.export import load, load_model
from pipeline.export.features import unit
from pipeline.export.hub import CODE, decoding_imp, preparing_imp
from pipeline.export.media import Rates, canonical
from tests.exported_models import FILM, MODELS, ONE_SPACE, PAIRS, PICTURE, SIZES, SOUND, exported, inputs_of

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None,
    reason="PyTorch is not installed (3 GB): `pip install -e .[hub]`, or `python -m benchmarks.hub`, compares with it",
)
# --- from items to tokens, without PyTorch ---


def tokens_of(name: str, item: object, settings: object, variant: Variant, **rates: float) -> tuple:
    """Tokens and positions as evaluation makes them."""
    clip = canonical(item, name, MODALITIES[name], settings, clip_s=1.0, rates=Rates(**rates))
    made = evaluation_tokens(clip, MODALITIES[name], settings, View(variant), TokenSpec())
    return made["tokens"], made["positions"]


def of_folder(name: str, item: object, settings: object, variant: Variant) -> tuple:
    """The same by the code that goes with an export."""
    settings, model = dataclasses.asdict(settings), dataclasses.asdict(ModelConfig(**SIZES))
    if name == "audio":
        return preparing_imp.sound_tokens(decoding_imp.waveform(item, settings, 1.0), settings, model)
    frames = decoding_imp.picture(item, settings)[None] if name == "image" else decoding_imp.clip(item, settings)
    return preparing_imp.vision_tokens(frames, dataclasses.asdict(variant), model)


def assert_same(found: tuple, expected: tuple) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("name", ["turned.jpg", "clear.png", "deep.png", "palette.gif", "large.jpg", "small.webp"])
def test_a_picture_becomes_the_tokens_of_evaluation(tmp_path, name):
    path, options = tmp_path / name, {}
    picture = Image.fromarray(noise(50, 75, 3)).resize((600, 400) if name == "large.jpg" else (75, 50))
    if name == "turned.jpg":
        exif = Image.Exif()
        exif[0x0112], options = 6, {"exif": exif}
    elif name == "clear.png":
        picture = Image.fromarray(noise(50, 75, 4))
    elif name == "deep.png":
        picture = Image.fromarray(noise(50, 75, 2).view(np.uint16)[..., 0])
    elif name == "palette.gif":
        picture = picture.quantize(16)
    picture.save(path, **options)
    spec = ImageSpec(short_side=40)
    assert_same(of_folder("image", str(path), spec, PICTURE), tokens_of("image", str(path), spec, PICTURE))


def test_arrays_become_the_tokens_of_evaluation():
    pixels, frames = noise(50, 75, 3), noise(30, 40, 33, 3)
    spec = ImageSpec(short_side=40)
    for item in (pixels, Image.fromarray(pixels)):
        assert_same(of_folder("image", item, spec, PICTURE), tokens_of("image", item, spec, PICTURE))
    for count, fps in ((30, 24.0), (30, 30.0), (3, 24.0), (1, 8.0)):
        spec = VideoSpec(fps=8.0, short_side=32, max_frames=12)
        given = {"array": frames[:count], "video_metadata": {"fps": fps}}
        expected = tokens_of("video", frames[:count], spec, FILM, fps=fps)
        assert_same(of_folder("video", given, spec, FILM), expected)


def test_files_of_videos_and_sounds_become_the_tokens_of_evaluation(tmp_path, write_video):
    short, long = tmp_path / "short.mp4", tmp_path / "long.mp4"
    write_video(short, num_frames=7, fps=24, height=48, width=80)
    write_video(long, num_frames=60, fps=25, height=80, width=48, sound_hz=440.0)
    spec = VideoSpec(fps=8.0, short_side=32, max_frames=8)
    for path in map(str, (short, long)):
        assert_same(of_folder("video", path, spec, FILM), tokens_of("video", path, spec, FILM))
    sound = np.random.default_rng(0).normal(size=(44_100, 2)).astype(np.float32) / 8
    soundfile.write(tmp_path / "a.flac", sound, 44_100)
    for path in (str(tmp_path / "a.flac"), str(long)):
        found, expected = (f("audio", path, SOUND, PICTURE) for f in (of_folder, tokens_of))
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize(
    ("spec", "seconds"),
    [
        (AUDIO_PRESETS["imp"], 3.0),
        (AUDIO_PRESETS["audiomae"], 3.0),
        (AUDIO_PRESETS["audiomae"], 12.0),
        (AudioSpec(mel_scale="slaney", num_frames=32), 1.0),
    ],
)
def test_a_sound_becomes_the_spectrogram_of_evaluation(spec, seconds):
    """A pure tone: what its quietest bands hold is rounding, which must be the same too."""
    sound = np.sin(np.arange(int(16_000 * seconds)) * 0.2).astype(np.float32) / 2
    found = preparing_imp.log_mel(sound, dataclasses.asdict(spec))
    np.testing.assert_allclose(found, log_mel(sound, spec), rtol=1e-5, atol=1e-5)


TOKENIZERS = [
    {"[PAD]": 0, "a": 1, "red": 2, "dog": 3, "[UNK]": 4},
    {"a": 0, "red": 1, "dog": 2, "[UNK]": 3},
]


@pytest.mark.parametrize("vocabulary", [None, *TOKENIZERS])
def test_a_text_becomes_the_tokens_of_evaluation(tokenizer, vocabulary):
    if vocabulary:
        import tokenizers

        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer = Tokenizer(backend.to_str().encode())
    ours = preparing_imp.Tokenizer(tokenizer.model)
    for text in ("a red dog", "dog dog unknown red a a a", "one two three"):
        expected = tokenizer.encode(text, 5)
        assert ours.ids(text, 5) == expected[expected != 0].tolist()
    with pytest.raises(ValueError, match="no tokens in ''"):
        ours.ids("", 5)


def test_no_more_kinds_of_files_are_opened_than_in_training():
    assert (decoding_imp.PICTURES, decoding_imp.CONTAINERS) == (image.FORMATS, container.FORMATS)
    assert (decoding_imp.COUNTS, decoding_imp.ROUNDING_S) == (audio.COUNTS, audio.ROUNDING_S)
    assert decoding_imp.FRAME_BYTES == audio.FRAME_BYTES


# --- the folder ---


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("dense") / "exported"
    exported(folder, tokenizer, {})
    return folder


def items() -> dict[str, list]:
    """Modality → items as the folder's code takes them, of several lengths."""
    rng = np.random.default_rng(0)
    sounds = [rng.normal(size=n).astype(np.float32) / 8 for n in (30_000, 2_000)]
    return {
        "text": ["one", "the digit seven", "three two one nine eight"],
        "image": list(noise(3, 50, 60, 3)),
        "video": [{"array": noise(n, 40, 32, 3), "video_metadata": {"fps": 8.0}} for n in (9, 3)],
        "audio": [{"array": sound, "sampling_rate": 16_000} for sound in sounds],
    }


@pytest.fixture
def module_of(monkeypatch):
    """Loads a folder's own code, as a loader does, and its module."""

    def load_folder(folder, **options):
        monkeypatch.delitem(sys.modules, "hub_copy", raising=False)
        copy = folder.parent / "hub_copy"
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        for name in CODE:
            shutil.copy(folder / name, copy)
        (copy / "__init__.py").touch()
        for name in [n for n in sys.modules if n.startswith("hub_copy")]:
            del sys.modules[name]
        monkeypatch.syspath_prepend(folder.parent)
        return importlib.import_module("hub_copy.modeling_imp").ImpModule.load(str(folder), model_kwargs=options)

    return load_folder


def vectors(module, given: list) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return module(module.preprocess(given))["sentence_embedding"].float().numpy()


def expected_place(folder, name: str, given: list, pair: tuple[str, str]) -> np.ndarray:
    """By jax, the items one by one; a head may follow another preparation than it was trained with."""
    encoder, (imp, params) = load(folder), load_model(folder)
    argument = {"text": "texts", "image": "images", "video": "videos", "audio": "audio"}[name]
    plain = [item["array"] if isinstance(item, dict) else item for item in given]
    data_set = {"image": "still"}.get(name, "moving")
    features = [
        encoder.embed(**{argument: [x]}, space="features", data_set=data_set, fps=8.0, sample_rate=16_000)[argument]
        for x in plain
    ]
    source = {"image": "vision", "video": "vision"}.get(name, name)
    (target,) = set(pair) - {source}
    return unit(np.asarray(imp.project(params, np.concatenate(features), source=source, target=target)))


@needs_torch
@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_vectors_are_those_of_jax(tmp_path, tokenizer, module_of, kind):
    exported(tmp_path / "exported", tokenizer, MODELS[kind])
    module = module_of(tmp_path / "exported")
    spaces = {"text_vision": PAIRS[2], "audio_vision": PAIRS[1], "audio_text": PAIRS[0]}
    assert module.spaces == list(spaces) and module.get_embedding_dimension() == 36
    for name, given in items().items():
        found = vectors(module, given).reshape(len(given), 3, 12)
        for number, (space, pair) in enumerate(spaces.items()):
            if any(one.modality == name and one.space == space for one in inputs_of()):
                expected = expected_place(tmp_path / "exported", name, given, pair)
                np.testing.assert_allclose(found[:, number], expected, atol=1e-5, rtol=0)
            else:
                assert not found[:, number].any()
        # In other company and order.
        np.testing.assert_allclose(vectors(module, given[::-1])[::-1], found.reshape(len(given), -1), atol=1e-5)


@needs_torch
@pytest.mark.slow
def test_all_modalities_in_one_space(tmp_path, tokenizer, module_of):
    exported(tmp_path / "exported", tokenizer, ONE_SPACE)
    module = module_of(tmp_path / "exported")
    assert module.spaces == ["audio_text_vision"] and module.get_embedding_dimension() == 12
    for name, given in items().items():
        embedder = {"image": "vision", "video": "vision"}.get(name, name)
        pair = next(pair for pair in PAIRS if embedder in pair)
        expected = expected_place(tmp_path / "exported", name, given, pair)
        np.testing.assert_allclose(vectors(module, given), expected, atol=1e-5, rtol=0)


@needs_torch
@pytest.mark.slow
def test_one_space_one_data_set_and_what_is_refused(dense_folder, module_of):
    module = module_of(dense_folder)
    assert (module.modalities, module.max_seq_length) == (["text", "image", "video", "audio"], 6)
    one = module_of(dense_folder, space="text_vision", data_set="still")
    assert (one.modalities, one.max_seq_length, one.get_embedding_dimension()) == (["text", "image", "video"], 4, 12)
    pictures = items()["image"]
    np.testing.assert_allclose(vectors(one, pictures), vectors(module, pictures)[:, :12], atol=1e-6)
    half = vectors(module_of(dense_folder, dtype=importlib.import_module("torch").bfloat16), pictures)
    np.testing.assert_allclose(half, vectors(module, pictures), atol=0.1)
    with pytest.raises(ValueError, match="space: expected one of text_vision, audio_vision, audio_text, found 'smell'"):
        module_of(dense_folder, space="smell")
    with pytest.raises(ValueError, match=r"data_set: expected one of \['moving', 'still'\], found 'x'"):
        module_of(dense_folder, data_set="x")
    with pytest.raises(ValueError, match="expected items of one of text, image, video, found audio"):
        one.preprocess(items()["audio"])
    with pytest.raises(ValueError, match="expected items of one of text, image, video, audio, found text, image"):
        module.preprocess(["one", pictures[0]])


@needs_torch
@pytest.mark.slow
def test_what_is_saved_again_loads_in_jax_and_in_torch(dense_folder, module_of, tmp_path):
    module = module_of(dense_folder)
    with importlib.import_module("torch").no_grad():
        module.encoder.arrays["embed_text/table"] *= 3
    out = tmp_path / "saved"
    out.mkdir()
    module.save(str(out))
    for name in CODE:
        shutil.copy(dense_folder / name, out)
    texts = items()["text"]
    assert np.abs(vectors(module, texts) - vectors(module_of(dense_folder), texts)).max() > 1e-3
    np.testing.assert_array_equal(vectors(module_of(out), texts), vectors(module, texts))
    found = expected_place(out, "text", texts, PAIRS[2])
    np.testing.assert_allclose(vectors(module, texts)[:, :12], found, atol=1e-5)
