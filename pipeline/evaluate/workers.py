"""Features of a manifest's rows, made in parts by several processes that each hold the model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from pipeline.data.spec import DecodeLimits, TokenSpec
from pipeline.evaluate.evaluator import PooledRows
from pipeline.evaluate.held_out import HeldOut, Side, joined, pooled_rows
from pipeline.evaluate.probes import RawValues
from pipeline.evaluate.trained_model import TrainedModel
from pipeline.export.features import Pools

# Rows of a part: at least enough to fill a batch of the model, at most what is quickly done again.
_MIN_ROWS, _MAX_ROWS = 64, 2048
# Parts for each worker, so that all end at about the same time.
_PARTS = 4


@dataclasses.dataclass(frozen=True)
class Part:
    """Some rows of a manifest, and how to pool them: the arguments of ``held_out.pooled_rows`` but the model."""

    side: Side
    manifest: str
    rows: Sequence[int]
    limits: DecodeLimits
    sizes: TokenSpec
    clips: int


def model_of(run_dir: Path, step: int) -> Callable[[], Callable[[Part], HeldOut]]:
    """Makes, in another process, the function that pools parts by a run's checkpoint."""
    return functools.partial(_load, run_dir, step)


def _load(run_dir: Path, step: int) -> Callable[[Part], HeldOut]:
    return functools.partial(_pool, TrainedModel(run_dir, step))


def _pool(model: TrainedModel, part: Part) -> HeldOut:
    options = {"limits": part.limits, "sizes": part.sizes, "clips": part.clips}
    return pooled_rows(model, part.side, part.manifest, rows=part.rows, **options)


def shared_out(call: Callable[[Iterable[Part]], Iterator[HeldOut]], *, num_workers: int) -> PooledRows:
    """``held_out.pooled_rows`` by workers. call: takes parts and yields their features, in any order."""

    def make(model: Pools, side: Side, manifest: str, *, rows: Sequence[int], **options) -> HeldOut:
        if isinstance(model, RawValues):
            return pooled_rows(model, side, manifest, rows=rows, **options)
        step = min(_MAX_ROWS, max(_MIN_ROWS, len(rows) // (_PARTS * num_workers)))
        parts = (Part(side, manifest, rows[i : i + step], **options) for i in range(0, len(rows), step))
        return joined(list(call(parts)))

    return make
