"""Small models with inputs of every kind, for tests and a benchmark of what exported folders carry."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np

from model.config import ModelConfig, MoEConfig
from model.imp import Imp
from pipeline.data.spec import AudioSpec, ImageSpec, Variant, VideoSpec
from pipeline.data.tokenizer import Tokenizer
from pipeline.export import save_model
from pipeline.export.inputs import Input

# Few samples, 2 x 2 patches: decoding and the transform cost nothing.
SOUND = AudioSpec(frame_length=256, hop_length=128, num_frames=32, num_mels=32)
SIZES = {"width": 32, "depth": 4, "num_heads": 4, "head_dim": 8, "mlp_dim": 48, "common_dim": 12, "vocab_size": 60}
PAIRS = (("audio", "text"), ("audio", "vision"), ("text", "vision"))
PICTURE, FILM = Variant("32x32", 1, 0, 32, 0.0, (1, 2, 2), 4), Variant("8x32x32", 1, 8, 32, 0.0, (2, 2, 2), 8)


def inputs_of(text_length: int = 6) -> list[Input]:
    """A data set "still" of images and texts, and "moving" of videos, sounds and longer texts."""
    still, moving = ImageSpec(short_side=40), VideoSpec(fps=8.0, short_side=32, max_frames=8)
    text_vision, audio_vision, audio_text = ("text", "vision"), ("audio", "vision"), ("audio", "text")
    film = {"settings": moving, "clip_s": 1.0, "variants": (FILM,)}
    sound = {"settings": SOUND, "clip_s": 1.0, "variants": (Variant("all", 1),)}
    return [
        Input("still", "image", "vision", settings=still, clip_s=1.0, variants=(PICTURE,), pair=text_vision),
        Input("still", "text", "text", text_length=text_length - 2, pair=text_vision, beside=("image",)),
        Input("moving", "video", "vision", **film, pair=audio_vision),
        Input("moving", "video", "vision", **film, pair=text_vision),
        Input("moving", "audio", "audio", **sound, pair=audio_vision),
        Input("moving", "audio", "audio", **sound, pair=audio_text),
        Input("moving", "text", "text", text_length=text_length, pair=audio_text, beside=("audio",)),
        Input("moving", "text", "text", text_length=text_length, pair=text_vision, beside=("video",)),
    ]


MODELS = {
    "dense": {},
    "experts choose": {"moe": MoEConfig(4, 2), "qk_norm": True},
    "tokens choose": {"moe": MoEConfig(4, 2, 0.8, router="tokens_choose", num_selected=2)},
    "the best tokens first": {"moe": MoEConfig(3, 2, 0.7, "interleaved", "tokens_choose", 2, batch_priority=True)},
    "towers": {"moe": MoEConfig(4, 4, 1.7, group="tokens"), "towers": "per_modality"},
    "padding takes part": {"moe": MoEConfig(4, 2, route_padding=True), "position_scale": 0.3},
}
ONE_SPACE = {"heads": "per_modality", "matryoshka": (6, 12)}


def exported(folder: Path, tokenizer: Tokenizer, fields: dict) -> None:
    """Writes a model of some fields of ModelConfig."""
    imp = Imp(ModelConfig(**SIZES | fields), modalities=("audio", "text", "vision"), pairs=PAIRS)
    params, rng = imp.init(0), np.random.default_rng(0)
    # As after training: no bias is zero, no scale one, and routers have preferences.
    params = jax.tree.map(lambda x: np.asarray(x + 0.1 * rng.normal(size=x.shape), np.float32), params)
    inputs = inputs_of()
    if imp.config.heads == "per_modality":
        inputs = [dataclasses.replace(one, pair=imp.spaces[0]) for one in inputs]
        inputs = [one for number, one in enumerate(inputs) if one not in inputs[:number]]
    save_model(folder, imp, params, step=1, tokenizer=tokenizer.model, inputs=inputs)
