"""The labels of whole manifests against the classes of a recipe, counted by column."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.manifest import Manifest

# Maximum rows whose labels are counted; from a larger manifest, evenly spread pieces.
MAX_ROWS = 1 << 26
# Maximum number of different labels that are counted.
_MAX_LABELS = 1 << 18


@dataclasses.dataclass(frozen=True)
class LabelCounts:
    """counts: label → occurrences in ``looked_at`` rows. without: classes → rows that have none of them."""

    looked_at: int
    counts: collections.Counter
    without: dict[tuple[str, ...], int]


def count_labels(manifest: Manifest, class_lists: set[tuple[str, ...]]) -> LabelCounts:
    """Counts the labels of a manifest. class_lists: the classes of each use; an empty list accepts any label."""
    looked_at, counts = 0, collections.Counter()
    without = dict.fromkeys(class_lists, 0)
    wanted = {classes: pa.array([c.encode() for c in classes], pa.large_binary()) for classes in class_lists}
    for batch in manifest.batches(("labels",), max_rows=MAX_ROWS):
        rows = batch.column(0)
        labels, parents = _flat(rows), pc.list_parent_indices(rows)
        looked_at += len(rows)
        for classes, values in wanted.items():
            fits = pc.is_in(labels, value_set=values) if classes else pc.is_valid(labels)
            without[classes] += len(rows) - len(np.unique(parents.filter(fits).to_numpy(zero_copy_only=False)))
        found = pc.value_counts(labels.drop_null())
        for raw, count in zip(found.field("values").to_pylist(), found.field("counts").to_pylist(), strict=True):
            label = raw.decode(errors="backslashreplace")
            if label in counts or len(counts) < _MAX_LABELS:
                counts[label] += count
    return LabelCounts(looked_at, counts, without)


def _flat(rows: pa.Array) -> pa.Array:
    """Every label of the rows as bytes: labels that are not UTF-8 count too."""
    return pc.list_flatten(rows).cast(pa.large_binary())
