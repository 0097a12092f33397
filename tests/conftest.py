"""Shared by all tests: a small demo corpus and a recipe of four tasks over it."""

from __future__ import annotations

import os
from importlib.metadata import version

# Before anything imports ray or jax: no network features, no accelerators, the machine's normal priority for decode.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# librosa, which spectrograms are compared with, compiles when it is imported.
os.environ.setdefault("NUMBA_OPT", "0")

import pytest

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="session")
def toy_corpus(tmp_path_factory):
    """The demo corpus cut to a few dozen rows a set."""
    from pipeline.data import demo

    return demo.build(tmp_path_factory.mktemp("corpus"), limit=48, progress=False)


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory):
    """Compiled steps for all tests that run the toy recipe."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="session")
def quick_compile() -> str:
    """XLA_FLAGS for processes that tests start: the same program of simpler kernels in a quarter of the time.

    Not for tests of what the compiler does: one fault of it that ``model/step.py`` goes around never shows this way.
    """
    flags = "--xla_backend_optimization_level=0"
    # Later ones have one kind of kernels, the slower to compile, and do not know the flag.
    return flags + " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10.")


@pytest.fixture(scope="session")
def make_toy_recipe(toy_corpus):
    """Makes ``toy_recipe``, for fixtures that several tests share."""
    return lambda: _toy_recipe(toy_corpus)


@pytest.fixture
def toy_recipe(make_toy_recipe):
    """A recipe as a plain dict, each test's own to change."""
    return make_toy_recipe()


def _toy_recipe(toy_corpus) -> dict:
    """Image classification with two variants, image-text, video-audio; tiny batches."""
    image = {"short_side": 32}
    moving = toy_corpus / "moving_digits"
    return {
        "seed": 3,
        "model": {"variant": "imp-tiny-moe"},
        "text": {"vocab_size": 60},
        "data_sets": {
            "digits": {
                "manifest": str(toy_corpus / "digits/train.parquet"),
                "held_out": str(toy_corpus / "digits/held_out.parquet"),
                "classes": DIGITS,
                "image": image,
            },
            "moving": {
                "manifest": str(moving / "train.parquet"),
                "held_out": str(moving / "held_out.parquet"),
                "classes": [*DIGITS, "left", "right", "up", "down"],
                "video": {"fps": 8.0, "short_side": 32, "max_frames": 8},
                "audio": {"frame_length": 1024, "hop_length": 512, "num_frames": 32, "num_mels": 32},
            },
        },
        "tasks": {
            "classes": {
                "data_set": "digits",
                "objective": "softmax",
                "modalities": ["image"],
                "batch_size": 8,
                "variants": [{"size": 16}, {"size": 32}],
            },
            "image_text": {
                "data_set": "digits",
                "objective": "nce",
                "modalities": ["image", "text"],
                "batch_size": 8,
                "text": "labels",
                "text_length": 6,
                "positives": "labels",
                "variants": [{"size": 32}],
            },
            "video_audio": {
                "data_set": "moving",
                "objective": "nce",
                "modalities": ["video", "audio"],
                "batch_size": 4,
                "variants": [{"size": 32, "frames": 8, "drop_rate": 0.5}],
            },
        },
        "train": {"num_steps": 14, "checkpoint_every": 5, "log_samples": True},
        "logging": {"progress": "plain", "progress_every_s": 1.0},
    }
