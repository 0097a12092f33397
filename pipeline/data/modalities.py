"""The kinds of input that tasks can use: image, video, audio, text, and those that a recipe adds.

To add one, write a module such as ``my_package/depth.py`` and name its ``Modality`` in the recipe:

    modalities: {depth: "my_package.depth:DEPTH"}
    data_sets:
      rooms: {manifest: rooms.parquet, media: {depth: {short_side: 64}}}   # settings of depth, all optional
    tasks:
      rooms: {data_set: rooms, modalities: [depth], objective: softmax, batch_size: 64, variants: [{size: 64}]}

The manifest has a column "depth" of paths or URIs. ``media`` holds settings where the defaults do not fit. A modality
that shares the embedder "vision" has variants, as images have. In ``my_package/depth.py``:

    @dataclasses.dataclass(frozen=True)
    class DepthSpec:                                      # plain values, each with a default
        short_side: int = 256
        max_bytes: int = 64 << 20                         # required: larger files are rejected unread

    def decode(source, spec, part):                       # runs in the decode process
        with Image.open(as_file(source)) as image: ...    # source: a local path or the file's bytes
        return array                                      # any numpy array; whatever it raises rejects the sample

    DEPTH = Modality(
        decode="my_package.depth:decode",
        settings="my_package.depth:DepthSpec",
        tokens="pipeline.data.sample_tokens:image_tokens",  # for (H, W, 3) uint8, or a function of your own
        embedder="vision",                                # or Embedder(...) for separate layers
    )

Functions are named as ``package.module:function``: decode processes and workers are other processes, and import them
only if they need them. The package must be importable there, as it is when jobs start in its parent folder or it is
installed. ``sample_tokens`` says what a function of tokens gets and returns, ``media.decoders`` and ``media.errors``
have helpers for decoding.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any


@dataclasses.dataclass(frozen=True)
class Embedder:
    """A modality's own embedding layers: one matrix for flattened patches, one learned position table an axis.

    num_values: values of a patch. positions: rows of each table. num_tokens: "package.module:function" of the settings
    that returns the number of tokens of a sample. Tokens are float32.
    """

    num_values: int
    positions: tuple[int, ...]
    num_tokens: str


@dataclasses.dataclass(frozen=True)
class Modality:
    """One kind of input, from manifest to model. Functions and types are named "package.module:name".

    decode: function (source, settings, part) → array, called in the decode process; source: a local path or the file's
      bytes; part: ``media.clip.Part``. Raises ``Reject`` for a bad file.
    settings: frozen dataclass of what ``decode`` and ``tokens`` depend on, with a default for every field; its field
      ``max_bytes`` is the largest file that is read.
    tokens: function (array, settings, context) → ``sample_tokens.Tokens``.
    embedder: the model's layers for these tokens: "vision", "audio", or its own ``Embedder``.
    columns: manifest columns that may name the file, the first non-empty one counts; by default the modality's name.
    """

    decode: str
    settings: str
    tokens: str
    embedder: str | Embedder
    columns: tuple[str, ...] = ()

    def columns_of(self, name: str) -> tuple[str, ...]:
        """The manifest columns of the modality with this name."""
        return self.columns or (name,)


MODALITIES = {
    "image": Modality(
        decode="pipeline.data.media.image:decode",
        settings="pipeline.data.spec:ImageSpec",
        tokens="pipeline.data.sample_tokens:image_tokens",
        embedder="vision",
    ),
    "video": Modality(
        decode="pipeline.data.media.video:decode",
        settings="pipeline.data.spec:VideoSpec",
        tokens="pipeline.data.sample_tokens:video_tokens",
        embedder="vision",
    ),
    "audio": Modality(
        decode="pipeline.data.media.audio:decode",
        settings="pipeline.data.spec:AudioSpec",
        tokens="pipeline.data.sample_tokens:sound_tokens",
        embedder="audio",
        # Sound may be the track of a video.
        columns=("audio", "video"),
    ),
}
# The modality that comes with the row, not from a file: ``captions`` has its tokens.
TEXT = "text"
# Modalities that come from files.
MEDIA = tuple(MODALITIES)


def embedder_name(name: str, modality: Modality) -> str:
    """The model's name for the layers of a modality."""
    return modality.embedder if isinstance(modality.embedder, str) else name


# Modality → the model's name for its layers: a still image and a video share theirs.
EMBEDDERS = {name: embedder_name(name, modality) for name, modality in MODALITIES.items()} | {TEXT: TEXT}


@functools.lru_cache(maxsize=256)
def load(name: str) -> Any:
    """The object named "package.module:object". Raises ValueError if there is none."""
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"expected package.module:name, found {name!r}")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise ValueError(f"expected package.module:name, found {name!r}: {e}") from e


def load_modality(name: str) -> Modality:
    """The ``Modality`` that a recipe names. Raises ValueError if it or something it names is missing."""
    found = load(name)
    if not isinstance(found, Modality):
        raise ValueError(f"expected a pipeline.data.modalities.Modality, found {type(found).__name__} at {name!r}")
    for part in (found.decode, found.settings, found.tokens):
        load(part)
    if isinstance(found.embedder, Embedder):
        load(found.embedder.num_tokens)
    elif found.embedder not in ("vision", "audio"):
        raise ValueError(f"embedder of {name!r}: expected vision, audio or an Embedder, found {found.embedder!r}")
    if "max_bytes" not in {f.name for f in dataclasses.fields(load(found.settings))}:
        raise ValueError(f"settings of {name!r}: expected a field max_bytes")
    return found
