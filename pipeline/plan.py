"""From a recipe to the plain data of its run; manifests, columns, checkpoints and the tokenizer are checked."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from model.config import NO_VOCABULARY
from pipeline import lint
from pipeline.credentials import redacted, redacted_values
from pipeline.data.columns import needed_columns
from pipeline.data.manifest import Manifest
from pipeline.data.row_index import RowIndex
from pipeline.data.run_data import DataSpec
from pipeline.data.shard_index import read_index
from pipeline.data.spec import DataSetSpec, TaskSpec
from pipeline.errors import RequestError
from pipeline.facts import facts_of
from pipeline.files import user_cache
from pipeline.recipe import Recipe, specs
from pipeline.run_tokenizer import choose_tokenizer
from pipeline.store.path import run_path
from pipeline.train.checkpoint_folder import CheckpointFolder
from pipeline.train.init_source import choose_step
from pipeline.train.mixture.samplers import make_sampler
from pipeline.train.mixture.schedule import MixtureSpec
from pipeline.train.spec import CheckpointSpec, PlacementSpec, RunSpec
from pipeline.train.telemetry import writers


def plan(recipe: Recipe, run_dir: Path | None = None, *, look: bool = True) -> RunSpec:
    """A recipe as the plain data of its run. Writes nothing in the run directory (``run_dir.claim`` does).

    run_dir: None if nothing is to be run. look: also look for problems that would stop or spoil the run (``lint``);
    warnings are printed. Raises RequestError if the data sets, the checkpoints or this machine cannot serve the
    recipe.
    """
    _check_writers(recipe)
    data = _data_spec(recipe)
    if look:
        _look(recipe, data)
    checkpoints = _checkpoint_spec(recipe, run_dir)
    tokenizer = choose_tokenizer(recipe, data, run_dir=run_dir, init_step=checkpoints.init_step)
    spec = RunSpec(
        run_dir="" if run_dir is None else str(run_dir.absolute()),
        # Stored in the run directory and in checkpoints; the specs have the URIs as they were given.
        recipe=redacted_values(recipe.to_dict()),
        data=dataclasses.replace(data, tokenizer=tokenizer.model) if tokenizer else data,
        model=specs.model_config(recipe, vocab_size=tokenizer.vocab_size if tokenizer else NO_VOCABULARY),
        optimizer=specs.optimizer_config(recipe),
        mixture=MixtureSpec(recipe.seed, recipe.train.num_steps, specs.sampler_spec(recipe)),
        checkpoints=checkpoints,
        placement=_placement_spec(recipe),
        logging=specs.logging_spec(recipe),
    )
    if run_dir is not None:
        # Refuses rows that changed since the newest checkpoint.
        spec.position()
    return spec


def _data_spec(recipe: Recipe) -> DataSpec:
    """All of a run's data but the tokenizer. Raises RequestError if a data set does not fit its tasks."""
    data_sets, tasks = specs.data_set_specs(recipe), specs.task_specs(recipe)
    used = {task.data_set for task in tasks.values()}
    fingerprints = {}
    for name in sorted(used):
        fingerprints[name], index = _check_data_set(data_sets[name], tasks)
        data_sets[name] = dataclasses.replace(data_sets[name], index=index)
    return DataSpec(tasks, data_sets, specs.token_spec(recipe), fingerprints)


def _checkpoint_spec(recipe: Recipe, run_dir: Path | None) -> CheckpointSpec:
    resumes = run_dir is not None and CheckpointFolder(run_dir).latest_step is not None
    source = recipe.init.from_ and specs.locate(recipe.init.from_)
    return CheckpointSpec(
        every=recipe.train.checkpoint_every,
        keep_last=recipe.checkpoint.keep_last,
        keep_every=recipe.checkpoint.keep_every,
        keep_best=recipe.checkpoint.keep_best,
        init_from=source,
        init_step=_init_step(run_path(source, option="init.from")) if source and not resumes else None,
    )


def _placement_spec(recipe: Recipe) -> PlacementSpec:
    cluster = recipe.cluster
    return PlacementSpec(
        expert_parallel=cluster.expert_parallel,
        fsdp=cluster.fsdp,
        deterministic=recipe.train.deterministic,
        compile_cache=cluster.compile_cache or str(user_cache() / "compiled"),
        stall_timeout_s=cluster.stall_timeout_s,
    )


def _look(recipe: Recipe, data: DataSpec) -> None:
    shares = _shares(recipe, data)
    _refuse(problems_of_recipe(recipe, data, shares=shares))
    for name in sorted(data.fingerprints):
        data_set = data.data_sets[name]
        if not data_set.shards:
            mine = [t for t in data.tasks.values() if t.data_set == name]
            _refuse(lint.problems_of(facts_of(data_set, mine), mine, draws=lint.draws_of(mine, shares)))


def problems_of_recipe(recipe: Recipe, data: DataSpec, *, shares: dict[str, float]) -> lint.Problems:
    """Problems that show without a look into the data. shares: task → its share of the steps."""
    out = lint.batches_of(data.tasks.values(), data.num_rows)
    out += lint.steps_of(shares, num_steps=recipe.train.num_steps)
    out += lint.variants_of(data.tasks.values())
    out += lint.sizes_of(data.tasks.values(), data.data_sets)
    return out


def _shares(recipe: Recipe, data: DataSpec) -> dict[str, float]:
    """Task → its share of the run's steps."""
    spec, num_steps = specs.sampler_spec(recipe), recipe.train.num_steps
    weights = spec.weights(data.tasks, data.num_rows)
    sampler = make_sampler(spec, weights, seed=recipe.seed, position={}, step=0, num_steps=num_steps)
    return dict(zip(sampler.names, (sampler.expected(0, num_steps) / num_steps).tolist(), strict=True))


def _refuse(problems: lint.Problems) -> None:
    """Raises RequestError for the first that would stop the run; prints the others."""
    for line in problems.warnings:
        print(redacted(f"warning: {line}"), file=sys.stderr, flush=True)
    for line in problems.errors:
        raise RequestError(line)


def _init_step(source: Path) -> int:
    """The step of the parameters of ``init.from``, of which nothing is damaged."""
    try:
        step, lines = choose_step(source)
    except RequestError as e:
        raise RequestError(f"init.from: {e}") from e
    for line in lines:
        print(f"warning: init.from: {line}", file=sys.stderr, flush=True)
    return step


def _check_writers(recipe: Recipe) -> None:
    for name, command in writers.missing(tuple(recipe.logging.writers or ())).items():
        raise RequestError(f"logging.writers: {name} is not installed; run {command}, or leave it out")


def _check_data_set(data_set: DataSetSpec, tasks: dict[str, TaskSpec]) -> tuple[dict, RowIndex | None]:
    """The fingerprint and the index of the training rows.

    Raises RequestError if a column is missing or there are no rows.
    """
    mine = [t for t in tasks.values() if t.data_set == data_set.name]
    if data_set.shards:
        fingerprint = read_index(Path(data_set.shards))["fingerprint"]
        if not fingerprint["num_rows"]:
            raise RequestError(f"data_sets.{data_set.name}.shards: {data_set.shards} has no rows")
        return fingerprint, None
    manifest = Manifest(data_set.manifest, media=data_set.media_columns)
    for task in mine:
        manifest.require(needed_columns(task, data_set, has=set(manifest.schema.names)))
    return manifest.fingerprint, manifest.index
