"""From a recipe to a run that can start: corpus, manifests, tokenizer and run directory checked and in place."""

from __future__ import annotations

import base64
import fcntl
import itertools
import sys
from pathlib import Path

import yaml

from pipeline import lint
from pipeline import recipe as recipes
from pipeline.credentials import redacted, redacted_values
from pipeline.data import prompts
from pipeline.data.columns import values
from pipeline.data.manifest import Manifest
from pipeline.data.shards import read_index
from pipeline.data.spec import DataSetSpec, TaskSpec
from pipeline.data.text import Tokenizer, load_tokenizer, text_fault, train_tokenizer
from pipeline.errors import RequestError
from pipeline.files import TEMPORARY_SUFFIX, make_folder, write_bytes
from pipeline.recipe import Recipe
from pipeline.train import writers
from pipeline.train.alarms import feed_advice
from pipeline.train.checkpoint import Checkpoints
from pipeline.train.recorder import LoggingSpec
from pipeline.train.run import RunSpec

# What a run directory may hold before its recipe is written: a kill in between leaves it usable.
_BEFORE_CONFIG = (".lock", "tokenizer.model")


def lock_run_dir(run_dir: Path):
    """Holds the run directory for this process; the lock goes with the process, however it ends."""
    make_folder(run_dir, "--run-dir")
    lock = open(run_dir / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise RequestError(f"--run-dir {run_dir}: another process is training there; wait for it or stop it") from e
    return lock


def check_run_dir(recipe: Recipe, run_dir: Path) -> list[str]:
    """Lines on how the mixture changes from that of the run directory. Writes nothing.

    Raises RequestError when the run directory belongs to another recipe.
    """
    path = run_dir / "config.yaml"
    if run_dir.exists() and not run_dir.is_dir():
        raise RequestError(f"--run-dir {run_dir}: expected a folder, found a file; use another")
    if path.exists():
        try:
            stored = recipes.read_yaml(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as e:
            raise RequestError(f"{path}: expected the run's recipe, found {' '.join(str(e).split())[:120]}") from e
        if not isinstance(stored, dict):
            raise RequestError(
                f"{path}: expected the run's recipe, found {type(stored).__name__}; use another --run-dir"
            )
        return recipes.check_resume(stored, recipe.to_dict())
    if run_dir.exists() and not all(_may_precede_config(p.name) for p in run_dir.iterdir()):
        raise RequestError(f"--run-dir {run_dir}: expected a run directory or an empty one, found other files")
    return []


def _may_precede_config(name: str) -> bool:
    return name in _BEFORE_CONFIG or name.endswith(TEMPORARY_SUFFIX)


def build_corpus(recipe: Recipe) -> None:
    """The demo corpus, where the recipe uses it and it is not there yet."""
    if recipes.uses_demo(recipe):
        from pipeline.data import demo

        try:
            demo.build(demo.cache_dir())
        except ImportError as e:
            raise RequestError(str(e)) from e


def prepare(recipe: Recipe, run_dir: Path, *, look: bool = True) -> RunSpec:
    """Checks the data sets against the tasks, gets the tokenizer, writes config.yaml. Raises RequestError.

    look: for what would stop or spoil the run, in the data too (``lint``); what is worth a look is printed.
    """
    _check_writers(recipe)
    data_sets, tasks = recipe.data_set_specs(), recipe.task_specs()
    used = {task.data_set for task in tasks.values()}
    fingerprints = {name: _check_data_set(data_sets[name], tasks) for name in sorted(used)}
    num_rows = {name: fingerprint["num_rows"] for name, fingerprint in fingerprints.items()}
    if look:
        _look(recipe, tasks, data_sets, num_rows)
    run_dir.mkdir(parents=True, exist_ok=True)
    own_step = Checkpoints(run_dir).latest_step
    init_step = _init_step(recipe) if own_step is None else None
    tokenizer = _tokenizer(recipe, run_dir, tasks, data_sets, own_step=own_step, init_step=init_step)
    model = recipe.model_config_for(vocab_size=tokenizer.vocab_size if tokenizer else 16)
    # Kept in the run directory and in checkpoints; the specs have the URIs as they were given.
    config = redacted_values(recipe.to_dict())
    train = recipe.train
    spec = RunSpec(
        run_dir=str(run_dir.absolute()),
        config=config,
        tasks=tasks,
        data_sets=data_sets,
        tokens=recipe.token_spec(),
        fingerprints=fingerprints,
        tokenizer=tokenizer.model if tokenizer else None,
        model=model,
        optimizer=recipe.optimizer(),
        seed=recipe.seed,
        num_steps=train.num_steps,
        checkpoint_every=train.checkpoint_every,
        keep_last=recipe.checkpoint.keep_last,
        keep_every=recipe.checkpoint.keep_every,
        sampler=recipe.sampler_spec(),
        stall_timeout_s=recipe.cluster.stall_timeout_s,
        init_from=recipe.init.from_ and recipes.locate(recipe.init.from_),
        init_step=init_step,
        logging=_logging(recipe),
        expert_parallel=recipe.cluster.expert_parallel,
        fsdp=recipe.cluster.fsdp,
        deterministic=recipe.train.deterministic,
        compile_cache=recipe.cluster.compile_cache or str(Path("~/.cache/imp/compiled").expanduser()),
    )
    # Once the recipe is written only it goes on, so what refuses it comes first.
    spec.position()
    write_bytes(run_dir / "config.yaml", recipes.dump(config).encode())
    return spec


def _look(
    recipe: Recipe, tasks: dict[str, TaskSpec], data_sets: dict[str, DataSetSpec], num_rows: dict[str, int]
) -> None:
    shares = _shares(recipe, tasks, num_rows)
    _refuse(problems_of_recipe(recipe, tasks, num_rows=num_rows, shares=shares))
    for name in sorted(num_rows):
        if not data_sets[name].shards:
            mine = [t for t in tasks.values() if t.data_set == name]
            _refuse(lint.problems_of(lint.facts_of(data_sets[name], mine), mine, draws=lint.draws_of(mine, shares)))


def problems_of_recipe(
    recipe: Recipe, tasks: dict[str, TaskSpec], *, num_rows: dict[str, int], shares: dict[str, float]
) -> lint.Problems:
    """What can be told without a look into the data. shares: task → part of the steps it is to get."""
    out = lint.batches_of(tasks.values(), num_rows)
    out += lint.steps_of(shares, num_steps=recipe.train.num_steps)
    out += lint.variants_of(tasks.values())
    return out


def _shares(recipe: Recipe, tasks: dict[str, TaskSpec], num_rows: dict[str, int]) -> dict[str, float]:
    """Task → the part of the run's steps it is to get."""
    spec, num_steps = recipe.sampler_spec(), recipe.train.num_steps
    sampler = spec.sampler(spec.weights(tasks, num_rows), seed=recipe.seed, position={}, step=0, num_steps=num_steps)
    return dict(zip(sampler.names, (sampler.expected(0, num_steps) / num_steps).tolist(), strict=True))


def _refuse(problems: lint.Problems) -> None:
    """Raises RequestError for the first that would stop the run; prints the others."""
    for line in problems.looks:
        print(redacted(f"warning: {line}"), file=sys.stderr, flush=True)
    for line in problems.stops:
        raise RequestError(line)


def _init_step(recipe: Recipe) -> int | None:
    """The step of ``init.from``'s newest checkpoint that is not damaged: the same for all processes of the run."""
    if recipe.init.from_ is None:
        return None
    source = Checkpoints(Path(recipes.locate(recipe.init.from_)))
    step, lines = source.choose()
    for line in lines:
        print(f"warning: init.from: {line}", file=sys.stderr, flush=True)
    return source.data(step)["step"]


def _check_writers(recipe: Recipe) -> None:
    for name, command in writers.missing(tuple(recipe.logging.writers or ())).items():
        raise RequestError(f"logging.writers: {name} is not installed; run {command}, or leave it out")


def _logging(recipe: Recipe) -> LoggingSpec:
    settings, cluster = recipe.logging, recipe.cluster
    named = writers.default_writers() if settings.writers is None else tuple(dict.fromkeys(settings.writers))
    advice = {
        name: feed_advice(
            task.data_set,
            from_shards=recipe.data_sets[task.data_set].shards is not None,
            on_cluster=cluster.num_workers != 0 or cluster.address is not None,
            clip_cache_mb=cluster.clip_cache_mb,
        )
        for name, task in recipe.tasks.items()
    }
    return LoggingSpec(
        progress=settings.progress,
        progress_every_s=settings.progress_every_s,
        log_every=recipe.train.log_every,
        log_samples=recipe.train.log_samples,
        writers=named,
        project=settings.project,
        profile_steps=settings.profile_steps,
        peak_flops=settings.peak_tflops and settings.peak_tflops * 1e12,
        feed_advice=advice,
    )


def needed_columns(task: TaskSpec, *, has: set[str]) -> dict[str, str]:
    """Manifest columns a task reads → why. Sound comes from the sound track where there is no audio column."""
    why = f"task {task.name}"
    columns = {"id": why}
    for modality in task.modalities:
        if modality == "audio":
            columns["audio" if "audio" in has or "video" not in has else "video"] = why
        elif modality != "text":
            columns[modality] = why
    if "text" in task.modalities:
        columns["labels" if task.text == "labels" else "text"] = why
    if task.classifies or task.positives == "labels":
        columns["labels"] = why
    return columns


def _check_data_set(data_set: DataSetSpec, tasks: dict[str, TaskSpec]) -> dict:
    """The fingerprint of the training rows. Raises RequestError when a column is missing or there is nothing."""
    mine = [t for t in tasks.values() if t.data_set == data_set.name]
    if data_set.shards:
        fingerprint = read_index(Path(data_set.shards))["fingerprint"]
        if not fingerprint["num_rows"]:
            raise RequestError(f"data_sets.{data_set.name}.shards: {data_set.shards} has no rows")
        return fingerprint
    manifest = Manifest(data_set.manifest)
    for task in mine:
        manifest.require(needed_columns(task, has=set(manifest.schema.names)))
    return manifest.fingerprint


def _tokenizer(
    recipe: Recipe,
    run_dir: Path,
    tasks: dict[str, TaskSpec],
    data_sets: dict[str, DataSetSpec],
    *,
    own_step: int | None,
    init_step: int | None,
) -> Tokenizer | None:
    """The run's own copy where there is one, the recipe's, or a new one trained on the data sets' text.

    Where the run starts from another one, that one's. The copy is named tokenizer.model whatever its form. own_step,
    init_step: the checkpoints that the run goes on from, or starts from.
    """
    if not any("text" in task.modalities for task in tasks.values()):
        return None
    path = run_dir / "tokenizer.model"
    if own_step is not None and (own := _tokenizer_of(run_dir, own_step)):
        # The checkpoint's is what the parameters were trained with, whatever became of the file.
        if not path.exists() or path.read_bytes() != own:
            write_bytes(path, own)
        return load_tokenizer(str(path))
    # Without a recipe beside it, the file is left from a start that failed and may belong to another recipe.
    if path.exists() and (run_dir / "config.yaml").exists():
        return load_tokenizer(str(path))
    if recipe.text.tokenizer:
        tokenizer = load_tokenizer(recipes.locate(recipe.text.tokenizer))
        write_bytes(path, tokenizer.model)
        return tokenizer
    if init_step is not None and (old := _tokenizer_of(Path(recipes.locate(recipe.init.from_)), init_step)):
        write_bytes(path, old)
        return load_tokenizer(str(path))
    sentences = itertools.chain.from_iterable(
        _sentences(task, data_sets[task.data_set]) for task in tasks.values() if "text" in task.modalities
    )
    return train_tokenizer(sentences, vocab_size=recipe.text.vocab_size, into=path)


def _tokenizer_of(run_dir: Path, step: int) -> bytes:
    """The tokenizer of a checkpoint, which its text parameters go with; empty where it has none."""
    return base64.b64decode(Checkpoints(run_dir).data(step)["tokenizer"])


# Maximum rows and characters of captions that a tokenizer learns from: more teach a vocabulary nothing new.
_MOST_CAPTIONS, _MOST_CHARACTERS = 1_000_000, 100_000_000


def _sentences(task: TaskSpec, data_set: DataSetSpec):
    """What a tokenizer should know of one task: its captions, or its labels in every prompt."""
    if task.text == "labels":
        templates = dict.fromkeys(prompts.train_templates(task.media[0]) + prompts.EVAL[task.media[0]])
        for label in task.classes or data_set.classes:
            yield from (template.format(label) for template in templates)
        return
    yield from _captions(Manifest(data_set.manifest), max_characters=task.max_characters)


def _captions(manifest: Manifest, *, max_characters: int):
    """Captions that can be used, from all over a manifest: the first of a sorted one speak of one thing."""
    rows = min(manifest.num_rows, _MOST_CAPTIONS)
    for batch in manifest.batches(("text",), most_rows=rows):
        left = _MOST_CHARACTERS * len(batch) / rows
        for caption in itertools.chain.from_iterable(texts or () for texts in values(batch.column(0), "text")):
            if left <= 0:
                break
            if text_fault(caption, max_characters=max_characters) is None:
                yield caption
                left -= len(caption)
