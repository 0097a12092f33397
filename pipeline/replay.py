"""Runs logged steps of a run again from one of its checkpoints, in this process, and compares what they give.

Reads the run directory and writes nothing there. Equal values show that the machine, its libraries, the data and the
code still do what they did; the first step that differs says where one of them does not.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from model import sharding
from model.imp import Imp
from model.step import compile_step, learning_rates
from pipeline import recipe as recipes
from pipeline.data.direct_queue import direct_queues
from pipeline.errors import DataError, RequestError
from pipeline.plan import plan
from pipeline.recipe import Recipe, specs
from pipeline.replay_comparison import Comparison, Replay
from pipeline.run_dir import CONFIG
from pipeline.store.path import run_path
from pipeline.train.checkpoint_folder import CheckpointFolder
from pipeline.train.compiler import StepCompiler
from pipeline.train.devices import use_compile_cache, use_compute_type
from pipeline.train.feed import Feed
from pipeline.train.initial_state import start_state
from pipeline.train.loop import Hooks, Loop
from pipeline.train.mixture.schedule import START, Schedule
from pipeline.train.quarantine import Quarantine, known_bad
from pipeline.train.rank import run_mesh
from pipeline.train.spec import RunSpec
from pipeline.train.step_gate import StepGate
from pipeline.waiting import waiting_for

_STEP = re.compile(rb'\{"step": (\d+),')


def replay(run_dir: Path, first: int, last: int, *, overrides: list[str] = ()) -> Replay:
    """Runs steps ``first`` to ``last`` of a run again, as metrics.jsonl counts them.

    overrides: of the run's recipe, e.g. where its data are now. Raises RequestError where nothing can be replayed,
    DataError where the checkpoint is damaged.
    """
    if not (run_dir / CONFIG).is_file():
        raise RequestError(f"--replay {run_dir}: expected a run directory, found no {CONFIG} in it")
    with tempfile.TemporaryDirectory(prefix="imp-replay-") as scratch:
        recipe = _recipe(run_dir, last, Path(scratch), overrides)
        spec = plan(recipe, run_dir, look=False)
        if last > spec.mixture.num_steps:
            raise RequestError(f"--steps {first}:{last}: the run has {spec.mixture.num_steps} steps")
        start = _checkpoint_before(spec, first)
        logged = _logged(run_dir, start, last)
        newest = max(logged, default=0)
        if newest < first or last - newest >= recipe.train.log_every:
            found, log = f"steps up to {newest}" if newest else "none", run_dir / "metrics.jsonl"
            raise RequestError(f"--steps {first}:{last}: {log} has {found} of these; ask for steps that are logged")
        comparison = Comparison(run_dir, logged)
        _run(spec, recipe, start, last, comparison, Path(scratch))
    return Replay(
        steps=(start + 1, last),
        checkpoint=start,
        compared=comparison.compared,
        exact=comparison.exact,
        keys=list(comparison.keys),
        difference=comparison.difference,
    )


def _recipe(run_dir: Path, last: int, scratch: Path, overrides: list[str]) -> Recipe:
    """The recipe that was in force at a step: that of the next checkpoint, or the run's present one."""
    checkpoints = CheckpointFolder(run_dir)
    step, path = checkpoints.oldest_from(last), run_dir / CONFIG
    if step is not None:
        path = scratch / CONFIG
        path.write_text(recipes.dump(checkpoints.data(step)["config"]), encoding="utf-8")
    # Nothing is written: what the writers need may not be installed here.
    return recipes.load(path, ["logging.writers=[]", *overrides])


def _checkpoint_before(spec: RunSpec, first: int) -> int:
    """The step of the newest whole checkpoint before a step; 0 for the first of the run, which needs none."""
    checkpoints = spec.open_checkpoints()
    step = checkpoints.newest_before(first)
    if step is None and first > 1:
        oldest = checkpoints.oldest_from(first)
        kept = f"the oldest is that of step {oldest}: ask for {oldest + 1}:…, or " if oldest is not None else ""
        raise RequestError(f"--steps {first}:…: no checkpoint before it is kept; {kept}ask for 1:… to begin at step 1")
    if step is not None:
        with waiting_for(f"checkpoint {step} to be compared with its digests"):
            damage = checkpoints.damage(step)
        if damage:
            raise DataError(
                f"checkpoint {step} is damaged: {damage}; its steps cannot be replayed. Put back a copy of it, or ask "
                "for steps after another one"
            )
    return step or 0


def _logged(run_dir: Path, start: int, last: int) -> dict[int, bytes]:
    """Step → its line in metrics.jsonl, for the steps after ``start``."""
    found = {}
    with contextlib.suppress(FileNotFoundError), (run_dir / "metrics.jsonl").open("rb") as file:
        for line in file:
            step = _STEP.match(line)
            # A line without an end was cut off.
            if step is not None and start < int(step[1]) <= last and line.endswith(b"\n"):
                found[int(step[1])] = line
    return found


def _run(spec: RunSpec, recipe: Recipe, start: int, last: int, comparison: Comparison, scratch: Path) -> None:
    """Runs the steps after ``start`` up to ``last``, or to the first that differs."""
    schedule = spec.schedule(spec.position(start) if start else START)
    spec = _placed_here(spec)
    use_compile_cache(spec.placement.compile_cache)
    config = use_compute_type(spec.model)
    mesh = run_mesh(config, schedule, expert_parallel=spec.placement.expert_parallel)
    imp = Imp.for_structures(config, schedule.model_structures)
    checkpoints = spec.open_checkpoints()
    non_finite = checkpoints.data(start).get("non_finite", {}) if start else {}
    gate = StepGate(lambda: comparison.difference is not None)
    with (
        _compiler(spec, imp, schedule, mesh, last) as compiler,
        _feed(spec, recipe, schedule, mesh, gate, scratch) as feed,
    ):
        state, _ = start_state(imp, spec, checkpoints, start, mesh=mesh)
        loop = Loop(
            state=state,
            feed=feed,
            compiler=compiler,
            gate=gate,
            steps=range(start, last),
            learning_rates=learning_rates(spec.optimizer),
            checkpoint_every=sys.maxsize,
            hooks=Hooks(record=comparison.record, save=lambda step, state: None, observe=schedule.observe),
            non_finite=collections.Counter(non_finite),
        )
        with waiting_for(lambda: f"the replay: step {max(start, comparison.step)} of {last}, all equal so far"):
            loop.run()


def _placed_here(spec: RunSpec) -> RunSpec:
    """The run on this machine's devices: whole on each where they cannot be divided as the run's were."""
    experts = spec.placement.expert_parallel
    if jax.device_count() % experts == 0:
        return spec
    return dataclasses.replace(spec, placement=dataclasses.replace(spec.placement, expert_parallel=1))


@contextlib.contextmanager
def _compiler(
    spec: RunSpec, imp: Imp, schedule: Schedule, mesh: jax.sharding.Mesh, last: int
) -> Iterator[StepCompiler]:
    options = {"mesh": mesh, "fsdp": spec.placement.fsdp, "deterministic": spec.placement.deterministic}
    structures = schedule.in_order_of_first_use()
    if last <= schedule.decided_until:
        used = {schedule[step].structure for step in range(schedule.start, last)}
        structures = [s for s in structures if s in used]
    compiler = StepCompiler(lambda structure: compile_step(imp, structure, spec.optimizer, **options), structures)
    with contextlib.closing(compiler):
        yield compiler


@contextlib.contextmanager
def _feed(
    spec: RunSpec, recipe: Recipe, schedule: Schedule, mesh: jax.sharding.Mesh, gate: StepGate, scratch: Path
) -> Iterator[Feed]:
    """The batches after the schedule's start. Rejects are drawn as the run's journal has them, new ones not kept."""
    begins = schedule.batches_before(schedule.start)
    running = sorted(spec.mixture.sampler.runs(spec.data.tasks))
    queues = direct_queues(
        spec.data,
        {name: (begins[name], schedule.batches_at_most(name)) for name in running},
        seed=spec.mixture.seed,
        known_bad=known_bad(run_path(spec.run_dir)),
        cache_bytes=specs.cluster_spec(recipe).cache_bytes,
        limits=specs.decode_limits(recipe),
    )
    feed = Feed(
        schedule,
        queues,
        to_devices=lambda arrays: sharding.put_batch(arrays, mesh),
        quarantine=Quarantine(scratch, rank=0),
        gate=gate,
    )
    with contextlib.closing(feed):
        yield feed
