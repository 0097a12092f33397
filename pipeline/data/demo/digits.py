"""The 1,797 handwritten digits of scikit-learn as images, and the split that moving digits share.

Source: ``sklearn.datasets.load_digits``, the test set of the UCI "Optical Recognition of Handwritten Digits" data:
8x8 pixels with values 0..16, light ink on a dark ground.

A digit is held out if it is in the first 20 % of its class, ordered by a hash of its index: a fixed set, stratified
over the classes. A source digit that is held out here is held out in moving digits too.
"""

from __future__ import annotations

import functools
import io
import itertools

import numpy as np
from PIL import Image

from pipeline.data.demo.corpus_plan import CorpusPlan, first_rows, stable_hash

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_HELD_OUT_SHARE = 0.2
_IMAGE_SIZE = 64
DIGIT_SIZE = 40
# Grey level, of 255. Nearly black would be one large value common to all images, which the first layer would learn
# before the ink.
BACKGROUND = 64
_LARGEST_VALUE = 16


@functools.cache
def load() -> tuple[np.ndarray, np.ndarray]:
    """The source digits: values 0..16, (1797, 8, 8) uint8, and classes 0..9, (1797,)."""
    from sklearn.datasets import load_digits

    source = load_digits()
    return source.images.astype(np.uint8), source.target


def split_by_class(classes: np.ndarray) -> dict[str, dict[int, list[int]]]:
    """Split → class → source indices of that class in the split, in hash order."""
    splits = {"train": {}, "held_out": {}}
    for digit in range(len(NAMES)):
        indices = sorted(np.flatnonzero(classes == digit).tolist(), key=lambda index: stable_hash("digit", index))
        num_held_out = round(_HELD_OUT_SHARE * len(indices))
        splits["held_out"][digit] = indices[:num_held_out]
        splits["train"][digit] = indices[num_held_out:]
    return splits


def split_indices(classes: np.ndarray, *, limit: int | None) -> dict[str, list[int]]:
    """Split → source indices in the order of the source, which mixes the classes."""
    shares = {"train": 1 - _HELD_OUT_SHARE, "held_out": _HELD_OUT_SHARE}
    return {
        split: first_rows(sorted(itertools.chain.from_iterable(by_class.values())), limit=limit, share=shares[split])
        for split, by_class in split_by_class(classes).items()
    }


def plan(*, limit: int | None) -> CorpusPlan:
    """Plans rows with an image and the digit's name as label."""
    values, classes = load()
    jobs, manifests = [], {}
    for split, indices in split_indices(classes, limit=limit).items():
        manifests[split] = [
            {
                "id": f"digit-{index:04d}",
                "image": f"images/{index:04d}.png",
                "text": [],
                "labels": [NAMES[classes[index]]],
                "source_digit": index,
            }
            for index in indices
        ]
        jobs += [{"path": f"digits/images/{i:04d}.png", "values": values[i].tolist()} for i in indices]
    return CorpusPlan(name="digits", jobs=jobs, manifests=manifests)


def draw(values: list[list[int]]) -> np.ndarray:
    """Enlarges a source digit (8, 8) to (DIGIT_SIZE, DIGIT_SIZE) uint8 grey, light on the ground."""
    ink = np.rint(np.array(values) * (255 / _LARGEST_VALUE)).astype(np.uint8)
    ink = np.asarray(Image.fromarray(ink).resize((DIGIT_SIZE, DIGIT_SIZE), Image.Resampling.BICUBIC))
    return np.rint(BACKGROUND + ink * ((255 - BACKGROUND) / 255)).astype(np.uint8)


def render(job: dict) -> bytes:
    """Draws the PNG of one digit in the middle of its ground, as large as in the videos."""
    picture = np.full((_IMAGE_SIZE, _IMAGE_SIZE), BACKGROUND, np.uint8)
    edge = (_IMAGE_SIZE - DIGIT_SIZE) // 2
    picture[edge : edge + DIGIT_SIZE, edge : edge + DIGIT_SIZE] = draw(job["values"])
    out = io.BytesIO()
    Image.fromarray(picture).save(out, format="png", compress_level=1)
    return out.getvalue()
