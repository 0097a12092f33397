"""A look at one data set: some of its rows decoded, its labels counted, its captions read."""

from __future__ import annotations

import collections
import time

import numpy as np

from pipeline.data.captions import CaptionCount
from pipeline.data.manifest import Manifest
from pipeline.data.media.clip import source_path
from pipeline.data.media.errors import Reject
from pipeline.data.media.process import DecodeLimits
from pipeline.data.sources import MediaSource
from pipeline.data.spec import TaskSpec
from pipeline.data.tokenizer import Tokenizer
from pipeline.facts import Facts, classes_of, needs_label

_PERCENTILES = (5, 50, 95)
# Maximum number of examples in a list.
_MAX_SHOWN = 10


def look_at(
    facts: Facts,
    tasks: list[TaskSpec],
    tokenizer: Tokenizer | None,
    *,
    sample: int,
    limits: DecodeLimits,
) -> dict:
    """The entry of a data set in the result of ``check.check``. sample: the number of rows to decode, evenly spread."""
    media = tuple(m for m in facts.data_set.media if any(m in t.modalities for t in tasks))
    source = MediaSource(facts.data_set, modalities=media, limits=limits)
    manifest = source.manifest
    rows = np.unique(np.linspace(0, manifest.num_rows - 1, min(sample, manifest.num_rows)).astype(int)).tolist()
    decoded = _decode(source, rows)
    repeats = facts.repeats
    return {
        "rows": manifest.num_rows,
        "columns": manifest.schema.names,
        "sampled": len(rows),
        **decoded,
        "duplicate_ids": {
            "count": repeats.ids,
            "rows": repeats.rows,
            "looked_at": repeats.looked_at,
            "examples": [repeats.example[0]] if repeats.example else [],
        },
        "held_out": {name: _held_out(facts, name) for name in facts.held_out},
        "labels": _labels(facts, tasks),
        "text": _text(manifest, tasks, tokenizer, rows),
    }


def _decode(source: MediaSource, rows: list[int]) -> dict:
    """Rejects by reason, seconds of CPU for each sample, and the properties in the files' headers."""
    media, manifest = source.modalities, source.manifest
    rejects: collections.Counter[str] = collections.Counter()
    examples: list[dict] = []
    cost: dict[str, list[float]] = collections.defaultdict(list)
    sizes: dict[str, list[float]] = collections.defaultdict(list)
    if rows and media:
        _try(source, rows[0], media[0])  # libraries load at first use
    for row in rows:
        record, first = manifest.row(row), None
        for modality in media:
            began = time.process_time() + source.decoders.cpu_s
            reject = _try(source, row, modality)
            cost[modality].append(time.process_time() + source.decoders.cpu_s - began)
            first = first or reject
            # A file that may not be opened is not probed either.
            if reject is None or reject.reason != "unknown_scheme":
                for key, value in _probe(source, record, modality).items():
                    sizes[f"{modality} {key}"].append(value)
        if first:
            rejects[first.reason] += 1
            examples.append({"id": record["id"], "reason": first.reason, "detail": first.detail})
    return {
        "rejects": {"count": sum(rejects.values()), "reasons": dict(rejects), "examples": examples[:_MAX_SHOWN]},
        "decode_s_per_sample": {m: float(np.mean(values)) for m, values in cost.items() if values},
        "media": {key: _percentiles(values) for key, values in sizes.items()},
    }


def _try(source: MediaSource, row: int, modality: str) -> Reject | None:
    try:
        source.media(row, modality)
    except Reject as e:
        return e
    return None


def _probe(source: MediaSource, record: dict, modality: str) -> dict[str, float]:
    try:
        path, column = source_path(record, source.data_set.modality(modality).columns_of(modality))
        return source.decoders.probe(path, column)
    # Decoding has a better message.
    except Reject:
        return {}


def _percentiles(values: list[float]) -> dict[str, float]:
    return {f"p{p}": round(float(v), 3) for p, v in zip(_PERCENTILES, np.percentile(values, _PERCENTILES), strict=True)}


def _held_out(facts: Facts, name: str) -> dict[str, int]:
    found = facts.held_out[name]
    if found is None:
        return {"rows": facts.num_rows, "ids_in_training": facts.num_rows, "media_in_training": facts.num_rows}
    return {"rows": found.rows, "ids_in_training": found.ids, "media_in_training": found.media}


def _labels(facts: Facts, tasks: list[TaskSpec]) -> dict:
    found, data_set = facts.labels, facts.data_set
    if found is None:
        return {}
    without = {t.name: found.without[classes_of(t, data_set)] for t in tasks if needs_label(t)}
    return {
        "looked_at": found.looked_at,
        "distinct": len(found.counts),
        "most_common": dict(found.counts.most_common(_MAX_SHOWN)),
        "least_common": dict(found.counts.most_common()[: -_MAX_SHOWN - 1 : -1]),
        "rows_without_a_class": max(without.values(), default=0),
        "classes_without_a_row": [c for c in data_set.classes if c not in found.counts][:_MAX_SHOWN],
    }


def _text(manifest: Manifest, tasks: list[TaskSpec], tokenizer: Tokenizer | None, rows: list[int]) -> dict:
    captioned = [t for t in tasks if "text" in t.modalities and t.text == "captions"]
    if not captioned or tokenizer is None:
        return {}
    count, texts = CaptionCount(captioned[0].max_characters), []
    for row in rows:
        texts += count.add(list(manifest.row(row).get("text") or ()))
    out = {"captions": len(texts), "unusable": dict(count.unusable), "rows_without_a_caption": count.rows_without}
    if not texts:
        return out
    tokens = np.array([tokenizer.count(text) for text in texts])
    return out | {
        "characters": _percentiles([len(t) for t in texts]),
        "tokens": _percentiles(tokens),
        "cut": {t.name: round(float((tokens > t.text_length).mean()), 3) for t in captioned},
    }
