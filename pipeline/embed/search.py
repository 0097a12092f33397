"""The nearest items of each modality to a text or a file: exact, over the parts of a folder, a block at a time."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.importers.listing import modality_of
from pipeline.data.media.errors import Reject
from pipeline.data.modalities import EMBEDDERS, TEXT
from pipeline.embed import folder as folders
from pipeline.embed.decoding import Decoders, file_of
from pipeline.embed.folder import Description
from pipeline.embed.preparations import modalities_of, query_input
from pipeline.errors import DataError, RequestError, one_line
from pipeline.export import Encoder, load
from pipeline.export.choices import FEATURES
from pipeline.export.config import CONFIG
from pipeline.export.inputs import Input
from pipeline.export.media import check_decoder
from pipeline.files import sha256_of

# Items that are compared with the query at a time.
_ROWS_PER_BLOCK = 16_384
# Columns of a hit.
_SHOWN = ["id", "modality", "source", "caption", "prepared_as", "start_s", "end_s"]


@dataclasses.dataclass(frozen=True)
class Query:
    """A text, or a file of a modality."""

    modality: str
    value: str


@dataclasses.dataclass(frozen=True)
class Hit:
    """An item near the query. score: cosine, from -1 to 1."""

    score: float
    space: str
    id: str
    modality: str
    source: str
    caption: str | None
    prepared_as: str
    start_s: float | None
    end_s: float | None


@dataclasses.dataclass
class Found:
    """hits: modality → the nearest items, the best first. compared: number of items by modality.

    unreachable: modalities that no space connects with the query.
    """

    query: Query
    hits: dict[str, list[Hit]] = dataclasses.field(default_factory=dict)
    compared: dict[str, int] = dataclasses.field(default_factory=dict)
    unreachable: tuple[str, ...] = ()


def query_of(text: str | None, file: str | None, modality: str | None) -> Query:
    """The query that was asked for. Raises RequestError unless there is just one text or file."""
    if (text is None) == (file is None):
        raise RequestError('expected a text, as in imp search "a dog barking", or --file; found both or none')
    if text is not None:
        if modality_of(text) and os.path.isfile(text):
            raise RequestError(f"{text}: expected a text, found a file; to look for what is in it: --file {text}")
        return Query(TEXT, text)
    assert file is not None
    if "://" not in file and not os.path.isfile(file):
        raise RequestError(f"--file {file}: expected an image, a video or a sound, found no such file")
    found = modality or modality_of(file)
    if found is None:
        raise RequestError(
            f"--file {file}: expected an ending of an image, a video or a sound; --modality says which it is"
        )
    return Query(found, file)


def open_folder(folder: Path) -> tuple[Description, Encoder]:
    """A folder of embeddings with the model that made them. Raises RequestError if either is damaged or missing."""
    description = folders.read_description(folder, "--in")
    model = folder / description.model
    encoder = load(model)
    if sha256_of(model / CONFIG) != description.digest:
        raise RequestError(f"--in {folder}: {model} is no longer the model that made its embeddings; embed again")
    return description, encoder


class Search:
    """Compares queries with the items of a folder."""

    def __init__(self, folder: Path, *, space: str | None = None) -> None:
        """space: the only one to compare by; the one that connects two modalities by default. Raises RequestError."""
        self.folder = Path(folder)
        self.description, self.encoder = open_folder(self.folder)
        self._spaces = tuple(name for name in self.description.spaces if name != FEATURES)
        if space is not None and space not in self._spaces:
            raise RequestError(f"--space: expected one of {', '.join(self._spaces)}, found {space}")
        self._wanted = space
        self.decoders = Decoders()

    def nearest(self, query: Query, count: int) -> Found:
        """The nearest ``count`` items of each modality. Raises RequestError for a query that cannot be embedded."""
        known = modalities_of(self.encoder, self._spaces)
        if query.modality not in known:
            raise RequestError(f"the model embeds {', '.join(known)}; found a query of {query.modality}")
        found, vectors, tops = Found(query), _Vectors(self, query), {}
        spaces = [space for space in self._spaces if self._has(query.modality, space)]
        for block in self._blocks([*_SHOWN, "reject", *spaces]):
            for (modality, data_set), rows in _groups(block):
                space = self.space_between(query.modality, modality)
                vector = vectors.of(modality, data_set, space) if space else None
                if space is None or vector is None:
                    found.unreachable = tuple(sorted({*found.unreachable, modality}))
                    continue
                here, scores = _scores(block.column(space), rows, vector)
                found.compared[modality] = found.compared.get(modality, 0) + len(here)
                _keep_best(tops.setdefault(modality, []), block, here, scores, count=count, space=space)
        found.hits = {name: [hit for _, _, hit in sorted(tops[name], reverse=True)] for name in known if name in tops}
        return found

    def space_between(self, query: str, item: str) -> str | None:
        """The space by which two modalities are compared; None without one.

        The one that was trained on the two if there is one, else any that both lead to.
        """
        both = [space for space in self._spaces if self._has(query, space) and self._has(item, space)]
        if self._wanted is not None:
            return self._wanted if self._wanted in both else None
        pair = {EMBEDDERS.get(query, query), EMBEDDERS.get(item, item)}
        return next((s for s in both if len(pair) == 2 and set(s.split("_")) == pair), both[0] if both else None)

    def embed(self, query: Query, one: Input, space: str) -> np.ndarray:
        """(K,) float32 of unit length: a query as an input of the model."""
        try:
            if query.modality == TEXT:
                samples = [self.encoder.text_sample(query.value, one)]
            else:
                samples = list(self.encoder.media_samples(self.clip(query.value, one), one, self.description.clips))
        except Reject as e:
            raise RequestError(f"the query cannot be read: {e}") from e
        features = self.encoder.model.features(one.embedder, samples)
        return self.encoder.vectors(features[None], one)[0]

    def clip(self, path: str, one: Input, times: tuple[float | None, float | None] = (None, None)) -> np.ndarray:
        """The canonical clip of a file. Raises Reject, RequestError for a decoder of the run's own, DataError."""
        check_decoder(one.modality, getattr(one.settings, "decoder", ""))
        schemes = (path.partition("://")[0],) if "://" in path else ()
        return self.decoders.decode(file_of(self.encoder, one, path, times=times, schemes=schemes))

    def _has(self, modality: str, space: str) -> bool:
        return any(one.modality == modality and one.space == space for one in self.encoder.config.inputs)

    def _blocks(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Some columns of all items. Raises DataError for a damaged part."""
        there = folders.parts(self.folder)
        if not there:
            raise RequestError(f"--in {self.folder}: expected parts of embeddings, found none; run imp embed again")
        for _, _, path in there:
            try:
                with pq.ParquetFile(path) as file:
                    yield from file.iter_batches(_ROWS_PER_BLOCK, columns=columns)
            except (pa.ArrowException, OSError) as e:
                raise DataError(f"{path}: expected a part of embeddings: {one_line(e)}; remove it, embed again") from e

    def missing_rows(self) -> int:
        """Manifest rows of parts that have not been made."""
        there = {(number, part) for number, part, _ in folders.parts(self.folder)}
        return sum(
            len(folders.part_rows(part, one.num_rows))
            for number, one in enumerate(self.description.inputs)
            for part in range(folders.num_parts(one.num_rows))
            if (number, part) not in there
        )


class _Vectors:
    """The query as each data set prepares it, embedded once for each different preparation."""

    def __init__(self, search: Search, query: Query) -> None:
        self._search, self._query = search, query
        self._known: dict[tuple[str, str], np.ndarray] = {}

    def of(self, modality: str, data_set: str, space: str) -> np.ndarray | None:
        encoder = self._search.encoder
        one = query_input(encoder, self._query.modality, space, data_set=data_set, beside=modality)
        if one is None:
            return None
        key = (space, one.preparation)
        if key not in self._known:
            self._known[key] = self._search.embed(self._query, one, space)
        return self._known[key]


def _groups(block: pa.RecordBatch) -> Iterator[tuple[tuple[str, str], np.ndarray]]:
    """((modality, data set), rows) of the items that were embedded."""
    embedded = block.column("reject").is_null().to_numpy(zero_copy_only=False)
    codes, names = zip(*(_codes(block.column(name)) for name in ("modality", "prepared_as")), strict=True)
    pairs = codes[0] * len(names[1]) + codes[1]
    for pair in np.unique(pairs[embedded]).tolist():
        modality, data_set = divmod(pair, len(names[1]))
        yield (names[0][modality], names[1][data_set]), np.flatnonzero(embedded & (pairs == pair))


def _codes(column: pa.StringArray) -> tuple[np.ndarray, list[str]]:
    """(number of the value of each row, the values)."""
    encoded = column.dictionary_encode()
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary.to_pylist()


def _scores(column: pa.FixedSizeListArray, rows: np.ndarray, vector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows that have a vector, their cosines). A value that is not finite counts as the worst."""
    here = column.is_valid().to_numpy(zero_copy_only=False)
    matrix = column.flatten().to_numpy().reshape(-1, len(vector))  # of the rows that have one
    places = np.cumsum(here) - 1
    rows = rows[here[rows]]
    scores = matrix[places[rows]] @ vector
    return rows, np.where(np.isfinite(scores), scores, -np.inf)


_ORDER = itertools.count()


def _keep_best(
    top: list[tuple[float, int, Hit]],
    block: pa.RecordBatch,
    rows: np.ndarray,
    scores: np.ndarray,
    *,
    count: int,
    space: str,
) -> None:
    """Adds the best of a block to a heap of at most ``count``; of equal scores the earlier item is kept.

    Equal texts are one.
    """
    known = {hit.source for _, _, hit in top}
    for place in np.argsort(-scores, kind="stable").tolist():
        score, row = float(scores[place]), int(rows[place])
        if len(top) >= count and score <= top[0][0]:
            break
        hit = _hit(block.slice(row, 1).select(_SHOWN).to_pylist()[0], score, space)
        if hit.modality == TEXT and hit.source in known:
            continue
        known.add(hit.source)
        entry = (score, -next(_ORDER), hit)
        (heapq.heappush if len(top) < count else heapq.heapreplace)(top, entry)


def _hit(row: Mapping[str, Any], score: float, space: str) -> Hit:
    return Hit(score=score, space=space, **row)
