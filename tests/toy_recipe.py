"""A recipe of four structures over the demo corpus, for tests and for benchmarks that kill runs."""

from __future__ import annotations

from pathlib import Path

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def toy_recipe_of(corpus: Path) -> dict:
    """Returns the recipe: image classification with two variants, image-text, video-audio; tiny batches.

    corpus: of ``pipeline.data.demo.build``.
    """
    image = {"short_side": 32}
    moving = corpus / "moving_digits"
    return {
        "seed": 3,
        "model": {"variant": "imp-tiny-moe"},
        "text": {"vocab_size": 60},
        "data_sets": {
            "digits": {
                "manifest": str(corpus / "digits/train.parquet"),
                "held_out": str(corpus / "digits/held_out.parquet"),
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
