"""The summary of a rank for summary.json: times, steps of each task, compiled graphs, rejects."""

from __future__ import annotations

import time

import jax

from pipeline.train.mixture.schedule import Schedule
from pipeline.train.rank import Rank


def summarize(rank: Rank, done: int) -> dict:
    """Plain values. done: updates since the start of the run."""
    schedule, compiler = rank.schedule, rank.compiler
    return {
        "steps": done,
        "start_step": schedule.start,
        "num_steps": schedule.num_steps,
        "skipped_updates": rank.loop.skipped_updates,
        "world_size": jax.process_count(),
        "num_devices": jax.device_count(),
        "num_parameters": sum(x.size for x in jax.tree.leaves(rank.imp.shapes())),
        "compile_count": compiler.num_compiled,
        "num_structures": len(set(schedule.structures.values())),
        "compile_alarms": len(compiler.alarms),
        "tasks": _tasks(schedule, done),
        "structures": _structures(rank),
        "plan": _plan(rank),
        "rejects": rank.gate.rejects_before(done).as_dict(),
        "time": _times(rank),
        "first_step_at": rank.recorder.first_step_at,
    }


def _tasks(schedule: Schedule, done: int) -> dict[str, dict]:
    counts = schedule.batches_before(done)
    positions = schedule.positions_before(done)
    expected = schedule.expected_before(done)
    return {
        name: {
            "weight": expected[name] / max(1, sum(expected.values())),
            "expected_steps": expected[name],
            "steps": counts[name],
            "examples": positions[name],
            "data_set": task.data_set,
            "rows": schedule.num_rows[task.data_set],
            "variants": _variant_counts(schedule, name, counts[name]),
        }
        for name, task in schedule.tasks.items()
    }


def _variant_counts(schedule: Schedule, task: str, num_batches: int) -> dict[str, int]:
    plan = schedule.plans[task]
    drawn = plan.variants[:num_batches]
    return {v.name: int((drawn == i).sum()) for i, v in enumerate(plan.task.variants)}


def _structures(rank: Rank) -> list[dict]:
    return [
        {
            "task": b.task,
            "variant": b.variant,
            "compile_s": round(rank.compiler.compile_s.get(b.structure, 0.0), 3),
            "tokens": b.tokens,
            "vision_tokens": b.vision_tokens,
            "flops": b.flops,
            "memory_estimate_bytes": b.memory_bytes,
            "memory_bytes": rank.compiler.memory_bytes(b.structure, rank.memory.need.layout),
        }
        for b in rank.budget
    ]


def _plan(rank: Rank) -> dict:
    """What was said before the first step, and the memory of the largest step as compiled."""
    memory = rank.memory
    return {"lines": rank.plan_lines, "needed_bytes": memory.needed, "limit_bytes": memory.limit}


def _times(rank: Rank) -> dict[str, float]:
    times, train_s = rank.loop.times, time.perf_counter() - rank.began
    evaluated = {"evaluate_s": round(times.evaluate_s, 3)} if times.evaluate_s else {}
    return {
        "data_wait_s": round(times.data_wait_s, 3),
        "compile_wait_s": round(times.compile_wait_s, 3),
        "steps_s": round(times.steps_s, 3),
        "save_s": round(times.save_s, 3),
        "compile_s": round(sum(rank.compiler.compile_s.values()), 3),
        "compile_share": round(times.compile_wait_s / train_s, 4),
        "train_s": round(train_s, 3),
    } | evaluated
