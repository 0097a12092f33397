"""A recipe to change, and what is refused of it."""

import copy
from pathlib import Path

import pytest

from pipeline import recipe as recipes
from pipeline.errors import RequestError

DEMO = Path(__file__).resolve().parents[3] / "configs" / "demo.yaml"
DELETE = object()
BASE = {
    "data_sets": {
        "photos": {
            "manifest": "/data/photos.parquet",
            "held_out": "/data/photos_test.parquet",
            "classes": ["cat", "dog"],
        },
        "films": {"manifest": "/data/films.parquet", "held_out": {"short": "/data/short.parquet", "long": "s3://b/l"}},
    },
    "tasks": {
        "photo_classes": {
            "data_set": "photos",
            "objective": "softmax",
            "modalities": ["image"],
            "batch_size": 64,
            "variants": [{"size": 256}, {"size": 512}, {"size": 512, "drop_rate": 0.75}],
        },
        "film_text": {
            "data_set": "films",
            "objective": "nce",
            "modalities": ["video", "text"],
            "batch_size": 64,
            "variants": [{"size": 128}, {"size": 256}],
        },
        "film_sound": {
            "data_set": "films",
            "objective": "nce",
            "modalities": ["video", "audio"],
            "batch_size": 32,
            "variants": [{"size": 256, "drop_rate": 0.75}],
        },
    },
    "train": {"num_steps": 100},
}


def changed(*changes: tuple[str, object]) -> dict:
    """BASE with values set at dotted paths; DELETE takes a key away."""
    raw = copy.deepcopy(BASE)
    for path, value in changes:
        *outer, last = path.split(".")
        node = raw
        for part in outer:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        last = int(last) if isinstance(node, list) else last
        if value is DELETE:
            del node[last]
        else:
            node[last] = value
    return raw


def refused(*changes: tuple[str, object]) -> str:
    with pytest.raises(RequestError) as caught:
        recipes.from_dict(changed(*changes))
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def task(name: str = "photo_classes", **fields) -> list[tuple[str, object]]:
    return [(f"tasks.{name}.{key}", value) for key, value in fields.items()]


CAPTIONED = {"modalities": ["image", "text"], "objective": {"softmax": 0.5, "nce": 2}}
TRIPLET = {"modalities": ["video", "audio", "text"]}
