"""A look at a recipe's data before a run: its rows, its problems, and the CPUs that decoding needs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import lint
from pipeline.check_data_set import look_at
from pipeline.check_page import write_check_page
from pipeline.commands import command
from pipeline.corpus import build_corpus
from pipeline.data.known_rejects import NONE_KNOWN
from pipeline.data.shard_index import damaged_shards
from pipeline.data.spec import DataSetSpec, DecodeLimits, TaskSpec
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import DataError, RequestError
from pipeline.facts import facts_of
from pipeline.host_memory import machine_cpus
from pipeline.plain_console import plain_console
from pipeline.plan import plan, problems_of_recipe
from pipeline.recipe import Recipe, specs
from pipeline.reject_lines import allowed_line, counts_line, no_caption_line
from pipeline.train.devices import use_compute_type
from pipeline.train.forecast import Forecast, measured_flops_per_s
from pipeline.train.forecast import lines as estimate_lines
from pipeline.train.mixture.schedule import START, Schedule
from pipeline.train.mixture.shape_budget import shape_budget
from pipeline.train.spec import RunSpec

# CPU seconds that Ray spends on a batch, in all of its processes.
_BATCH_CPU_S = 0.02


def check(recipe: Recipe, *, sample: int = 200, step_s: float | None = None, page: Path | None = None) -> dict:
    """{"data_sets": {name: what was found}, "decode_cpus": ..., "problems": [...], "usable": bool}.

    sample: rows to decode of each data set, evenly spread. step_s: the time of a training step that decoding must keep
    up with; None: an estimate for this machine. page: an HTML file to write, with samples as the model will see them. A
    problem that would stop a run makes the data unusable; the others are worth a look. Raises RequestError for problems
    that end a run before its first step.
    """
    build_corpus(recipe)
    spec = plan(recipe, look=False)
    tokenizer = Tokenizer(spec.data.tokenizer) if spec.data.tokenizer else None
    schedule = spec.schedule(START)
    shares = {name: schedule.share(name) for name in spec.data.tasks}
    problems = problems_of_recipe(recipe, spec.data, shares=shares)
    found, cpu_s = {}, 0.0
    for name, data_set in spec.data.data_sets.items():
        tasks = [t for t in spec.data.tasks.values() if t.data_set == name]
        if not tasks:
            continue
        found[name], its_problems = _look(
            data_set,
            tasks,
            shares=shares,
            tokenizer=tokenizer,
            sample=sample,
            limits=specs.decode_limits(recipe),
        )
        problems += its_problems
        cost = found[name]["decode_s_per_sample"]
        cpu_s += sum(shares[t.name] * (_decode_cpu_s(spec, t, cost) + _BATCH_CPU_S) for t in tasks)
    result = {
        "data_sets": found,
        **_supply(spec, schedule, cpu_s, step_s),
        "problems": [*problems.errors, *problems.warnings],
        "usable": not problems.errors,
    }
    if page:
        write_check_page(page, spec, tokenizer, result, specs.decode_limits(recipe))
    return result


def _look(
    data_set: DataSetSpec,
    tasks: list[TaskSpec],
    *,
    shares: dict[str, float],
    tokenizer: Tokenizer | None,
    sample: int,
    limits: DecodeLimits,
) -> tuple[dict, lint.Problems]:
    """(what was found in a data set, its problems). shares: task → its share of the steps."""
    facts = facts_of(dataclasses.replace(data_set, shards=None), tasks)
    found = look_at(facts, tasks, tokenizer, sample=sample, limits=limits)
    found["damaged_shards"] = damaged_shards(data_set.shards) if data_set.shards else []
    problems = _problems(data_set.name, data_set, found)
    problems += lint.problems_of(facts, tasks, draws=lint.draws_of(tasks, shares))
    return found, problems


def _decode_cpu_s(spec: RunSpec, task: TaskSpec, cost: dict[str, float]) -> float:
    """CPU seconds to decode a batch. cost: modality → seconds for each sample."""
    samples = float(np.mean([v.global_batch_size for v in task.variants]))
    decode_s = samples * sum(cost.get(m, 0.0) for m in task.modalities)
    return max(decode_s, _batch_cpu_s(spec, task))


def _batch_cpu_s(spec: RunSpec, task: TaskSpec) -> float:
    """CPU seconds of a batch as a stream makes it, its tokens too; 0 if its data do not allow it."""
    from pipeline.data.stream_spec import StreamSpec

    data_set = spec.data.data_sets[task.data_set]
    stream = StreamSpec(
        task=task,
        data_set=data_set,
        tokens=spec.data.tokens,
        tokenizer=spec.data.tokenizer,
        seed=spec.mixture.seed,
        fingerprint=spec.data.fingerprints[data_set.name],
        start=0,
        stop=1,
        share=1.0,
        known_bad=NONE_KNOWN,
        cache_bytes=0,
    )
    try:
        return stream.maker().cost_s(0)
    # The look at the data reports what is wrong.
    except (DataError, RequestError):
        return 0.0


def _supply(spec: RunSpec, schedule: Schedule, decode_cpu_s: float, step_s: float | None) -> dict[str, Any]:
    """decode_cpu_s_per_step, step_s, decode_cpus to keep up with it, and the lines that a run here would begin with.

    Where steps run on this machine's own CPUs also cpus, and wait_share: the share of a run's time that decoding takes
    from its steps there.
    """
    found: dict[str, Any] = {"decode_cpu_s_per_step": decode_cpu_s}
    if step_s is None:
        config = use_compute_type(spec.model)
        budget = shape_budget(schedule, config, spec.optimizer.freeze)
        forecast = Forecast(budget, flops_per_s=measured_flops_per_s(config))
        step_s = forecast.step_s()
        need = spec.need(schedule, config)
        found["estimate"] = estimate_lines(forecast, need, num_steps=schedule.num_steps)
        if need.layout.platform == "cpu":
            cpus = machine_cpus()
            found |= {"cpus": cpus, "wait_share": decode_cpu_s / (decode_cpu_s + step_s * cpus)}
    return found | {"step_s": step_s, "decode_cpus": decode_cpu_s / step_s}


def _problems(name: str, data_set: DataSetSpec, found: dict) -> lint.Problems:
    """Problems of the decoded sample, the captions and the shards."""
    out = lint.Problems()
    rejected, sampled = found["rejects"]["count"], found["sampled"]
    if rejected:
        line = f"{name}: {rejected} of {sampled} sampled rows are bad ({counts_line(found['rejects']['reasons'])})"
        over = rejected > data_set.max_reject_fraction * sampled
        out.add(f"{line}; {allowed_line(data_set)}", is_error=over)
    if found["damaged_shards"]:
        out.errors.append(
            f"{name}: {len(found['damaged_shards'])} shards are corrupt (checksum mismatch), e.g. "
            f"{found['damaged_shards'][0]}; remove them and run {command('preprocess')} again"
        )
    text = found["text"]
    if text.get("rows_without_a_caption"):
        line = no_caption_line(text["rows_without_a_caption"], f"{sampled} sampled rows", text["unusable"], data_set)
        over = text["rows_without_a_caption"] > data_set.max_reject_fraction * sampled
        out.add(f"{name}: {line}", is_error=over)
    for task, cut in text.get("cut", {}).items():
        if cut > 0.05:
            out.warnings.append(
                f"{name}: {cut:.0%} of the captions are longer than tasks.{task}.text_length and are cut"
            )
    return out


def _supply_line(result: dict) -> str:
    decode = f"decode takes {result['decode_cpu_s_per_step']:.2g} s of CPU a step"
    if "wait_share" not in result:
        return f"{decode}: {result['decode_cpus']:.1f} CPUs for steps of {result['step_s']:.2g} s, fewer with shards"
    return (
        f"{decode}, a step about {result['step_s']:.2g} s of all {result['cpus']} CPUs of this machine: on them about "
        f"{result['wait_share']:.0%} of a run's time goes to decode, less with shards or a clip cache"
    )


def print_check(result: dict) -> None:
    """Prints the result of ``check`` as tables."""
    from rich.table import Table

    console = plain_console()
    for name, one in result["data_sets"].items():
        table = Table(title=name, show_header=False, title_justify="left")
        named = len(one["held_out"]) > 1
        held_out = ", ".join(f"{k} {v['rows']:,}" if named else f"{v['rows']:,}" for k, v in one["held_out"].items())
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
    for line in result.get("estimate", []):
        console.print(line)
    console.print(_supply_line(result))
    for problem in result["problems"]:
        console.print(f"- {problem}")
    if not result["problems"]:
        console.print("no problems found")
