"""A look at a recipe's data before a run: what is there, what is bad, what decoding it takes."""

from __future__ import annotations

import collections
import dataclasses
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from pipeline import lint
from pipeline.data.columns import MEDIA_COLUMNS
from pipeline.data.manifest import Manifest
from pipeline.data.media.clip import source_path
from pipeline.data.media.errors import Reject
from pipeline.data.shards import damaged_shards
from pipeline.data.sources import MediaSource
from pipeline.data.spec import DataSetSpec, DecodeLimits, TaskSpec
from pipeline.data.tokenizer import CaptionCount, Tokenizer
from pipeline.errors import DataError, RequestError
from pipeline.host_memory import machine_cpus
from pipeline.prepare import build_corpus, prepare, problems_of_recipe
from pipeline.recipe import Recipe, specs
from pipeline.train.devices import use_compute_type
from pipeline.train.forecast import Forecast, measured_flops_per_s
from pipeline.train.mixture.schedule import START, Schedule
from pipeline.train.mixture.shape_budget import shape_budget
from pipeline.train.spec import RunSpec

_PERCENTILES = (5, 50, 95)
_MOST_SHOWN = 10
# CPU seconds that Ray spends on a batch, in all of its processes.
_BATCH_CPU_S = 0.02


def check(recipe: Recipe, *, sample: int = 200, step_s: float | None = None) -> dict:
    """{"data_sets": {name: what was found}, "decode_cpus": ..., "problems": [...], "usable": bool}.

    sample: rows to decode of each data set, evenly spread. step_s: the time of a training step that decoding must keep
    up with; None: an estimate for this machine. A problem that would stop a run makes the data unusable; the others
    are worth a look. Raises RequestError for what stops a run before its first step.
    """
    build_corpus(recipe)
    with tempfile.TemporaryDirectory() as folder:
        spec = prepare(recipe, Path(folder), look=False)
    tokenizer = Tokenizer(spec.tokenizer) if spec.tokenizer else None
    schedule = spec.schedule(START)
    shares = {name: schedule.share(name) for name in spec.tasks}
    of_recipe = problems_of_recipe(recipe, spec.tasks, num_rows=spec.num_rows, shares=shares)
    found, stops, looks = {}, of_recipe.stops, of_recipe.looks
    cpu_s = 0.0
    for name, data_set in spec.data_sets.items():
        tasks = [t for t in spec.tasks.values() if t.data_set == name]
        if not tasks:
            continue
        media = dataclasses.replace(data_set, shards=None)
        facts = lint.facts_of(media, tasks)
        one = _data_set(facts, tasks, tokenizer, sample=sample, limits=specs.decode_limits(recipe))
        one["damaged_shards"] = damaged_shards(data_set.shards) if data_set.shards else []
        found[name] = one
        for problems in (
            _problems(name, data_set, one),
            lint.problems_of(facts, tasks, draws=lint.draws_of(tasks, shares)),
        ):
            stops, looks = stops + problems.stops, looks + problems.looks
        cost = one["decode_s_per_sample"]
        for task in tasks:
            samples = float(np.mean([v.global_batch_size for v in task.variants]))
            decode_s = samples * sum(cost.get(m, 0.0) for m in task.modalities)
            cpu_s += shares.get(task.name, 0.0) * (max(decode_s, _batch_cpu_s(spec, task)) + _BATCH_CPU_S)
    return {
        "data_sets": found,
        **_supply(spec, schedule, cpu_s, step_s),
        "problems": [*stops, *looks],
        "usable": not stops,
    }


def _batch_cpu_s(spec: RunSpec, task: TaskSpec) -> float:
    """CPU seconds of a batch as a stream makes it, its tokens too; 0 where its data do not allow it."""
    from pipeline.cluster.streams import StreamSpec

    data_set = spec.data_sets[task.data_set]
    stream = StreamSpec(
        task=task,
        data_set=data_set,
        tokens=spec.tokens,
        tokenizer=spec.tokenizer,
        seed=spec.seed,
        fingerprint=spec.fingerprints[data_set.name],
        start=0,
        stop=1,
        share=1.0,
        known_bad={},
        cache_bytes=0,
    )
    try:
        return stream.maker().cost_s(0)
    # What is wrong is said by the look at the data.
    except (DataError, RequestError):
        return 0.0


def _supply(spec: RunSpec, schedule: Schedule, decode_cpu_s: float, step_s: float | None) -> dict:
    """decode_cpu_s_per_step, step_s, decode_cpus to keep up with it; where steps run on this machine's own CPUs also
    cpus, and wait_share: the part of a run's time that decode takes from its steps there."""
    found = {"decode_cpu_s_per_step": decode_cpu_s}
    if step_s is None:
        budget = shape_budget(schedule, config := use_compute_type(spec.model))
        step_s = Forecast(budget, flops_per_s=measured_flops_per_s(config)).step_s()
        if jax.default_backend() == "cpu":
            cpus = machine_cpus()
            found |= {"cpus": cpus, "wait_share": decode_cpu_s / (decode_cpu_s + step_s * cpus)}
    return found | {"step_s": step_s, "decode_cpus": decode_cpu_s / step_s}


def _data_set(
    facts: lint.Facts,
    tasks: list[TaskSpec],
    tokenizer: Tokenizer | None,
    *,
    sample: int,
    limits: DecodeLimits,
) -> dict:
    media = tuple(m for m in MEDIA_COLUMNS if any(m in t.modalities for t in tasks))
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
    """Rejects by reason, seconds of CPU a sample, and what the files say of themselves."""
    media, manifest = source.modalities, source.manifest
    rejects, examples, cost = collections.Counter(), [], collections.defaultdict(list)
    sizes: dict[str, list[float]] = collections.defaultdict(list)
    if rows and media:
        _try(source, rows[0], media[0])  # libraries load at first use
    for row in rows:
        bad = False
        record = manifest.row(row)
        for modality in media:
            began = time.process_time() + source.decoders.cpu_s
            reject = _try(source, row, modality)
            cost[modality].append(time.process_time() + source.decoders.cpu_s - began)
            # What may not be opened is not looked at either.
            if reject is None or reject.reason != "unknown_scheme":
                for key, value in _probe(source, record, modality).items():
                    sizes[f"{modality} {key}"].append(value)
            if reject and not bad:
                bad = True
                rejects[reject.reason] += 1
                if len(examples) < _MOST_SHOWN:
                    examples.append({"id": record["id"], "reason": reject.reason, "detail": reject.detail})
    return {
        "rejects": {"count": sum(rejects.values()), "reasons": dict(rejects), "examples": examples},
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
        path, from_video = source_path(record, modality)
        return source.decoders.probe(path, "video" if from_video else modality)
    # Decoding it says better what is wrong.
    except Reject:
        return {}


def _percentiles(values: list[float]) -> dict[str, float]:
    return {f"p{p}": round(float(v), 3) for p, v in zip(_PERCENTILES, np.percentile(values, _PERCENTILES), strict=True)}


def _held_out(facts: lint.Facts, name: str) -> dict[str, int]:
    found = facts.held_out[name]
    if found is None:
        return {"rows": facts.num_rows, "ids_in_training": facts.num_rows, "media_in_training": facts.num_rows}
    return {"rows": found.rows, "ids_in_training": found.ids, "media_in_training": found.media}


def _labels(facts: lint.Facts, tasks: list[TaskSpec]) -> dict:
    found, data_set = facts.labels, facts.data_set
    if found is None:
        return {}
    without = {t.name: found.without[lint.classes_of(t, data_set)] for t in tasks if lint.needs_label(t)}
    return {
        "looked_at": found.looked_at,
        "distinct": len(found.counts),
        "most_common": dict(found.counts.most_common(_MOST_SHOWN)),
        "least_common": dict(found.counts.most_common()[: -_MOST_SHOWN - 1 : -1]),
        "rows_without_a_class": max(without.values(), default=0),
        "classes_without_a_row": [c for c in data_set.classes if c not in found.counts][:_MOST_SHOWN],
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


def _problems(name: str, data_set: DataSetSpec, found: dict) -> lint.Problems:
    """Of the decoded sample, the captions and the shards."""
    stops, looks = [], []
    rejected, sampled = found["rejects"]["count"], found["sampled"]
    if rejected:
        line = f"{name}: {rejected} of {sampled} sampled rows are bad ({counts_line(found['rejects']['reasons'])})"
        over = rejected > data_set.max_reject_fraction * sampled
        (stops if over else looks).append(f"{line}; {allowed_line(data_set)}")
    if found["damaged_shards"]:
        stops.append(
            f"{name}: {len(found['damaged_shards'])} shards are not as they were written, e.g. "
            f"{found['damaged_shards'][0]}; remove them and run jobs/preprocess.py again"
        )
    text = found["text"]
    if text.get("rows_without_a_caption"):
        line = no_caption_line(text["rows_without_a_caption"], f"{sampled} sampled rows", text["unusable"], data_set)
        over = text["rows_without_a_caption"] > data_set.max_reject_fraction * sampled
        (stops if over else looks).append(f"{name}: {line}")
    for task, cut in text.get("cut", {}).items():
        if cut > 0.05:
            looks.append(f"{name}: {cut:.0%} of the captions are longer than tasks.{task}.text_length and are cut")
    return lint.Problems(stops, looks)


def counts_line(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items())


def allowed_line(data_set: DataSetSpec) -> str:
    return f"at most {100 * data_set.max_reject_fraction:.3g} % of rows may be rejected"


def no_caption_line(count: int, of: str, unusable: dict[str, int], data_set: DataSetSpec) -> str:
    why = f" ({counts_line(unusable)})" if unusable else ""
    return f"{count} of {of} have no caption that can be used{why}; {allowed_line(data_set)}"


def _supply_line(result: dict) -> str:
    decode = f"decode takes {result['decode_cpu_s_per_step']:.2g} s of CPU a step"
    if "wait_share" not in result:
        return f"{decode}: {result['decode_cpus']:.1f} CPUs for steps of {result['step_s']:.2g} s, fewer with shards"
    return (
        f"{decode}, a step about {result['step_s']:.2g} s of all {result['cpus']} CPUs of this machine: on them about "
        f"{result['wait_share']:.0%} of a run's time goes to decode, less with shards or a clip cache"
    )


def print_check(result: dict) -> None:
    """A table for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for name, one in result["data_sets"].items():
        table = Table(title=name, show_header=False, title_justify="left")
        held_out = ", ".join(f"{k} {v['rows']:,}" for k, v in one["held_out"].items())
        table.add_row("rows", f"{one['rows']:,}" + (f"; held out: {held_out}" if held_out else ""))
        compared = one["duplicate_ids"]["looked_at"]
        if compared < one["rows"]:
            table.add_row("ids", f"of {compared:,} rows compared with each other")
        table.add_row("columns", ", ".join(one["columns"]))
        table.add_row("bad", f"{one['rejects']['count']} of {one['sampled']} sampled")
        for example in one["rejects"]["examples"][:3]:
            table.add_row("", f"{example['id']}: {example['reason']}: {example['detail']}")
        for key, values in one["media"].items():
            table.add_row(key, "  ".join(f"{p} {v:g}" for p, v in values.items()))
        for modality, seconds in one["decode_s_per_sample"].items():
            table.add_row(f"{modality} decode", f"{1000 * seconds:.1f} ms of CPU a sample")
        if one["labels"]:
            common = ", ".join(f"{k} {v:,}" for k, v in list(one["labels"]["most_common"].items())[:5])
            table.add_row("labels", f"{one['labels']['distinct']:,} distinct: {common}")
        if one["text"].get("captions"):
            for key in ("characters", "tokens"):
                table.add_row(f"caption {key}", "  ".join(f"{p} {v:g}" for p, v in one["text"][key].items()))
        console.print(table)
    console.print(_supply_line(result))
    for problem in result["problems"]:
        console.print(f"- {problem}", markup=False)
    if not result["problems"]:
        console.print("no problems found")
