"""The features of rows and texts that measurements share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from pipeline.data.captions import usable_captions
from pipeline.data.manifest import Manifest
from pipeline.data.media.errors import Reject
from pipeline.data.prompts import eval_templates
from pipeline.data.spec import TaskSpec
from pipeline.data.tokenizer import encode_text
from pipeline.errors import RequestError
from pipeline.evaluate.held_out import HeldOut, Side, pooled_rows, sample_of
from pipeline.evaluate.measurement import Measurement
from pipeline.evaluate.probes import RawValues
from pipeline.evaluate.trained_model import EvaluatedModel
from pipeline.export.features import Pools, class_anchors, mean_over_clips, pooled, unit
from pipeline.recipe import specs

# Makes the features of some rows of a manifest, as ``held_out.pooled_rows``.
PooledRows = Callable[..., HeldOut]
# Texts whose features are in memory at a time.
_TEXTS = 4096


class Evaluator:
    """A model with the features that several measurements need, each computed once.

    max_rows: bound on every measurement's rows. make: pools rows, elsewhere if need be.
    """

    def __init__(self, model: EvaluatedModel, *, max_rows: int | None = None, make: PooledRows = pooled_rows) -> None:
        self.model = model
        self._max_rows = max_rows
        self._make = make
        self._cache: dict[tuple, HeldOut] = {}

    def at_dim(self, dim: int) -> Evaluator:
        """The same with the leading dimensions of its spaces, sharing all features."""
        fewer = copy.copy(self)
        fewer.model = self.model.at_dim(dim)
        return fewer

    def rows(self, measurement: Measurement, side: Side | None = None) -> HeldOut:
        """The measured rows. side: the measured one by default. Raises RequestError if none could be read."""
        asked = [n for n in (measurement.settings.max_rows, self._max_rows) if n is not None]
        max_rows = min(asked, default=None)
        return self._rows(measurement, side or measurement.side, measurement.manifest, max_rows, self.model)

    def fit_rows(self, measurement: Measurement) -> HeldOut:
        """The rows to learn from."""
        most = measurement.settings.max_fit_rows
        return self._rows(measurement, measurement.side, measurement.fit_manifest, most, self.model)

    def raw(self, measurement: Measurement, manifest: str, max_rows: int | None) -> HeldOut:
        """The rows' pixels or spectrograms in place of features."""
        return self._rows(measurement, measurement.side, manifest, max_rows, RawValues())

    def _rows(self, measurement: Measurement, side: Side, manifest: str, max_rows: int | None, model: Pools) -> HeldOut:
        clips = 1 if side.modality == "image" or isinstance(model, RawValues) else measurement.settings.clips
        key = (repr(side), manifest, clips, max_rows, type(model))
        if key not in self._cache:
            found_rows = Manifest(manifest, media=side.data_set.media_columns)
            columns, num_rows = side.data_set.modality(side.modality).columns_of(side.modality), found_rows.num_rows
            if not set(columns) & set(found_rows.columns):
                raise RequestError(
                    f"manifest {manifest}: expected a column {' or '.join(columns)}, for {side.modality}; found "
                    f"{', '.join(found_rows.schema.names)}"
                )
            found_rows.require(_needed(measurement))
            found = self._make(
                model,
                side,
                manifest,
                rows=sample_of(num_rows, max_rows),
                clips=clips,
                limits=specs.decode_limits(self.model.recipe),
                sizes=self.model.tokens,
            )
            if not found.rows:
                raise RequestError(f"evaluate: none of the {num_rows} rows of {manifest} could be read")
            self._cache[key] = found
        return self._cache[key]

    # --- the common space ---

    def embed_texts(self, task: TaskSpec, texts: Sequence[str], *, target: str) -> np.ndarray:
        """(n, K) in the space with ``target``, before normalisation; equal texts are computed once."""
        if self.model.tokenizer is None:
            raise RequestError("evaluate: the model was trained without texts, so it has no tokenizer")
        different = list(dict.fromkeys(texts))
        parts = [self._projected(task, different[i : i + _TEXTS], target) for i in range(0, len(different), _TEXTS)]
        place = {text: i for i, text in enumerate(different)}
        return np.concatenate(parts)[[place[text] for text in texts]]

    def _projected(self, task: TaskSpec, texts: list[str], target: str) -> np.ndarray:
        def samples() -> Iterator[dict]:
            for text in texts:
                try:
                    arrays = encode_text(self.model.tokenizer, text, task.text_length)
                except Reject as e:
                    raise RequestError(f"evaluate: the text {text[:80]!r}: {e}") from e
                yield {name.partition("/")[2]: array for name, array in arrays.items()}

        return self.model.project(pooled(self.model, "text", samples()), source="text", target=target)

    def anchors(self, measurement: Measurement, task: TaskSpec, classes: Sequence[str]) -> np.ndarray:
        """(classes, K) of unit length: the mean of a class's prompts."""
        prompts = prompts_of(measurement)
        step = max(1, _TEXTS // len(prompts))
        parts = []
        for start in range(0, len(classes), step):
            texts = [prompt.format(name) for name in classes[start : start + step] for prompt in prompts]
            projected = self.embed_texts(task, texts, target=measurement.side.embedder)
            parts.append(class_anchors(projected, len(prompts)))
        return np.concatenate(parts)

    def embed_rows(self, rows: HeldOut, *, source: str, target: str) -> np.ndarray:
        """(rows, K) of unit length: the mean over a row's clips before normalisation."""
        return unit(mean_over_clips(lambda x: self.model.project(x, source=source, target=target), rows.features))

    def captions(self, rows: HeldOut, task: TaskSpec) -> list[tuple[str, ...]]:
        """The usable captions of each row."""
        if self.model.tokenizer is None:
            return [()] * len(rows.rows)
        limit = task.max_characters
        return [usable_captions(t, self.model.tokenizer, max_characters=limit) for t in rows.texts]


def _needed(measurement: Measurement) -> dict[str, str]:
    """Columns without which nothing can be measured, beside the media → the kind that needs them."""
    kind = measurement.settings.kind
    if kind != "retrieval":
        words = "labels"
    elif len(measurement.sides) == 1:
        words = "text"
    else:
        words = "id"  # two media are compared by row
    return dict.fromkeys(("id", words), kind)


def prompts_of(measurement: Measurement) -> list[str]:
    """The sentences around a class."""
    return list(measurement.settings.prompts or eval_templates(measurement.side.modality))
