"""StableHLO of an exported model: jax alone runs it, for any number of samples, and comes to the same places."""

import importlib.util

import jax.export
import numpy as np
import pytest
from safetensors.numpy import load_file

from model.config import ModelConfig, MoEConfig
from model.imp import Imp
from pipeline.data.tokens import patchify
from pipeline.errors import RequestError
from pipeline.export import load, save_model, stablehlo
from tests.exported_models import PAIRS, SIZES, inputs_of

needs_flatbuffers = pytest.mark.skipif(
    importlib.util.find_spec("flatbuffers") is None, reason="flatbuffers is not installed: pip install -e .[stablehlo]"
)


@needs_flatbuffers
@pytest.mark.slow
def test_any_number_of_samples_comes_to_the_places_of_the_encoder(tmp_path, tokenizer):
    moe = MoEConfig(3, 1, 0.7, router="tokens_choose", num_selected=2, batch_priority=True)
    imp = Imp(ModelConfig(**SIZES | {"depth": 1}, moe=moe), modalities=("text", "vision"), pairs=PAIRS[2:])
    inputs, folder = [one for one in inputs_of() if one.data_set == "still"], tmp_path / "exported"
    save_model(folder, imp, imp.init(0), step=1, tokenizer=tokenizer.model, inputs=inputs, stablehlo=True)
    encoder, arrays = load(folder), load_file(folder / "model.safetensors")
    texts = ["one", "the digit seven", "three two one"]
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    pictures = np.kron(pixels, np.ones((1, 2, 2, 1), np.uint8))[:, 12:52, 12:52]  # (3, 40, 40, 3), cut to 32 below
    tokens = {
        "text": np.stack([tokenizer.encode(text, 4) for text in texts]),
        "image": np.stack([patchify(p, (1, 16, 16)) for p in _middle(pictures)]),
    }
    given = {"text": {"texts": texts}, "image": {"images": list(pictures)}}
    for name, request in given.items():
        function = jax.export.deserialize(bytearray((folder / f"{name}.stablehlo").read_bytes()))
        used = {key: arrays[key] for key in function.in_tree.unflatten(function.in_avals)[0][0]}
        (expected,) = encoder.embed(**request, space="text_vision").values()
        for count in (1, 3) if name == "text" else (3,):
            found = function.call(used, tokens[name][:count])
            assert set(found) == {"text_vision"}
            np.testing.assert_allclose(found["text_vision"], expected[:count], atol=2e-6)


def _middle(pictures: np.ndarray) -> np.ndarray:
    """(n, 1, 32, 32, 3): the middle square at the model's size, as Pillow resizes it."""
    from PIL import Image

    return np.stack([np.asarray(Image.fromarray(p).resize((32, 32), Image.Resampling.BILINEAR)) for p in pictures])[
        :, None
    ]


def test_a_missing_package_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(stablehlo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"--stablehlo needs the package flatbuffers: pip install flatbuffers"):
        stablehlo.check_package()
