"""The run directory: held by one process, made for one recipe, its newest checkpoint sound."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Protocol

import yaml

from pipeline import recipe as recipes
from pipeline.errors import RequestError, one_line
from pipeline.files import TEMPORARY_SUFFIX, make_folder, write_bytes
from pipeline.recipe import Recipe
from pipeline.run_lock import FolderLock, ObjectLock
from pipeline.store.ownership import LOCK
from pipeline.store.path import ObjectPath
from pipeline.train.attempts import saved_step
from pipeline.train.checkpoint_folder import CheckpointFolder, check_path
from pipeline.train.spec import RunSpec

CONFIG = "config.yaml"
# Whatever its format, which its first byte tells.
TOKENIZER = "tokenizer.model"
# Files that a run directory may hold before its recipe is written: a kill in between leaves it usable.
_BEFORE_CONFIG = (LOCK, TOKENIZER)
# Minimum bytes of a checkpoint that takes seconds to read.
_SLOW_BYTES = 4_000_000_000


class Lock(Protocol):
    """A lock that is held until ``close``."""

    def close(self) -> None:
        """Lets go of it."""
        ...


def lock_run_dir(run_dir: Path) -> Lock:
    """Holds the run directory for this process; the lock goes with the process, however it ends."""
    make_folder(run_dir, "--run-dir")
    if isinstance(run_dir, ObjectPath):
        return ObjectLock(run_dir / LOCK)
    return FolderLock(run_dir / LOCK)


def check_run_dir(recipe: Recipe, run_dir: Path) -> list[str]:
    """Lines on how the mixture changes from that of the run directory. Writes nothing.

    Raises RequestError when the run directory belongs to another recipe, when its checkpoints are gone, or when its
    path can hold none.
    """
    path = run_dir / CONFIG
    check_path(run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise RequestError(f"--run-dir {run_dir}: expected a folder, found a file; use another")
    if path.exists():
        changes = recipes.check_resume(_stored_recipe(path), recipe.to_dict())
        _check_not_lost(run_dir, every=recipe.train.checkpoint_every)
        return changes
    if run_dir.exists() and not all(_may_precede_config(p.name) for p in run_dir.iterdir()):
        raise RequestError(f"--run-dir {run_dir}: expected a run directory or an empty one, found other files")
    return []


def _check_not_lost(run_dir: Path, *, every: int) -> None:
    """Raises RequestError if the run had checkpoints and has none: it would begin anew and drop its log."""
    folder = CheckpointFolder(run_dir)
    if folder.latest_step is None and (step := saved_step(run_dir, every=every)):
        why = "".join(f" ({line})" for line in folder.faults()[-1:])
        raise RequestError(
            f"--run-dir {run_dir}: its step {step} was saved, and {folder.folder} holds no whole checkpoint{why}; put "
            "them back (was a copy interrupted? is a disk not mounted?), or use another --run-dir to begin anew"
        )


def _stored_recipe(path: Path) -> dict:
    try:
        stored = recipes.read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise RequestError(f"{path}: expected the run's recipe, found {one_line(e)[:120]}") from e
    if not isinstance(stored, dict):
        raise RequestError(f"{path}: expected the run's recipe, found {type(stored).__name__}; use another --run-dir")
    return stored


def _may_precede_config(name: str) -> bool:
    return name in _BEFORE_CONFIG or name.endswith(TEMPORARY_SUFFIX)


def claim(run_dir: Path, spec: RunSpec) -> None:
    """Writes the tokenizer and then the recipe, from when on the directory accepts no other recipe."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path, tokenizer = run_dir / TOKENIZER, spec.data.tokenizer
    if tokenizer and not (path.exists() and path.read_bytes() == tokenizer):
        write_bytes(path, tokenizer)
    write_bytes(run_dir / CONFIG, recipes.dump(spec.recipe).encode())


def set_damaged_aside(run_dir: Path) -> None:
    """Reads the newest checkpoint before the run goes on from it, and sets it aside for the one before if damaged."""
    checkpoints = CheckpointFolder(run_dir)
    if checkpoints.latest_bytes > _SLOW_BYTES:
        size = checkpoints.latest_bytes / 1e9
        print(f"comparing checkpoint {checkpoints.latest_step} ({size:.0f} GB) with its digests", flush=True)
    _, lines = checkpoints.choose(set_aside=True)
    for line in lines:
        print(f"warning: {line}", file=sys.stderr, flush=True)
