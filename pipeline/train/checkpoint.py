"""Checkpoints by Orbax: one item holds parameters, optimiser, step, positions, class lists, tokenizer and config."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from orbax.checkpoint import v1 as ocp

from pipeline.errors import RequestError

# Orbax warns at each save about a merge of files that a single JSON value does not need.
logging.getLogger("absl").setLevel(logging.ERROR)

# Bumped when the layout of what is stored changes.
FORMAT = 1


class Checkpoints:
    """The checkpoints of a run directory. Orbax writes aside and renames, so a half-written one is never listed."""

    def __init__(self, run_dir: Path, *, keep_last: int = 2):
        folder = Path(run_dir).absolute() / "checkpoints"
        _refuse_links(folder)
        self._checkpointer = ocp.training.Checkpointer(folder)
        self._keep_last = keep_last

    @property
    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, *, state: dict, data: dict) -> None:
        """Blocks until the checkpoint is whole. data: plain JSON values. Every process of the run calls it."""
        text = json.dumps({"format": FORMAT, "step": step} | data)
        self._checkpointer.save_checkpointables(step, {"state": state, "data": {"json": text}})
        for old in self._checkpointer.checkpoints[: -self._keep_last]:
            self._checkpointer.delete(old.step)

    def data(self, step: int | None = None) -> dict:
        """What is stored beside the arrays. Raises RequestError without a checkpoint, or for another format."""
        step = self.latest_step if step is None else step
        if step is None:
            raise RequestError("no finished checkpoint in this run directory; train first")
        data = json.loads(self._checkpointer.load_checkpointables(step, {"data": None})["data"]["json"])
        if data["format"] != FORMAT:
            raise RequestError(f"checkpoint {step} has format {data['format']}, this version reads {FORMAT}")
        return data

    def state(self, abstract: dict, *, step: int | None = None) -> dict:
        """The arrays. abstract: jax.ShapeDtypeStruct leaves with the shardings they shall have."""
        step = self.latest_step if step is None else step
        return self._checkpointer.load_checkpointables(step, {"state": abstract})["state"]

    def close(self) -> None:
        self._checkpointer.close()


def _refuse_links(folder: Path) -> None:
    """The storage library follows symbolic links, so a checkpoint from elsewhere could read any file."""
    links = [p for p in folder.rglob("*") if p.is_symlink()] if folder.exists() else []
    if links:
        raise RequestError(f"checkpoint: expected plain files, found the symbolic link {links[0]}")
