"""Checkpoints: Orbax writes the arrays in the background, ``run.json`` beside them makes a checkpoint whole.

``checkpoints/<step>/`` holds what Orbax wrote and, put there last, ``run.json``: step, position, class lists,
tokenizer, config, and the size of every file. What lacks it, or a file that it lists, is never chosen.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp

from pipeline.errors import DataError, RequestError, one_line
from pipeline.files import write_bytes

# Orbax warns at each save about a merge of files that a single JSON value does not need.
logging.getLogger("absl").setLevel(logging.ERROR)

# Bumped when the layout of what is stored changes.
FORMAT = 2
# Of a disk that a save is about to fill: what must stay free beside the arrays.
_SPARE_BYTES = 32 << 20


class Checkpoints:
    """The checkpoints of a run directory.

    keep_last: so many of the newest are kept. keep_every: those of steps that it divides are kept too, for ever.
    """

    def __init__(self, run_dir: Path, *, keep_last: int = 2, keep_every: int | None = None):
        self.folder = Path(run_dir).absolute() / "checkpoints"
        self._keep_last, self._keep_every = keep_last, keep_every
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def _folders(self) -> list[int]:
        """The steps that have a folder, whole or not, rising."""
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdigit()) if self.folder.is_dir() else []

    @property
    def steps(self) -> list[int]:
        """The steps of the whole checkpoints, rising."""
        return [step for step in self._folders() if self._fault(step) is None]

    @property
    def latest_step(self) -> int | None:
        # From the newest on: of a long run's many checkpoints only one need be looked through.
        return next((step for step in reversed(self._folders()) if self._fault(step) is None), None)

    def faults(self) -> list[str]:
        """A line for every folder of a step that is passed over, and why."""
        faults = {step: self._fault(step) for step in self._folders()}
        return [f"checkpoint {step} is passed over: {fault}" for step, fault in faults.items() if fault]

    def _fault(self, step: int) -> str | None:
        """Why a checkpoint is not whole; None where it is."""
        folder = self.folder / str(step)
        try:
            files = json.loads((folder / "run.json").read_text(encoding="utf-8"))["files"]
            for name, size in files.items():
                found = (folder / name).lstat().st_size
                if found != size:
                    return f"{name} has {found} bytes, {size} were written"
        except FileNotFoundError as e:
            return f"{Path(e.filename).relative_to(folder)} is missing"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            return f"run.json cannot be read: {one_line(e)}"
        return None

    def remove_leftovers(self) -> None:
        """Removes what saves that were killed left behind. One process calls it, before any saves."""
        for path in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)

    def check_space(self, state) -> None:
        """Raises DataError where the disk cannot hold the arrays of ``state`` (arrays or their shapes) once more."""
        needed = _bytes(state) + _SPARE_BYTES
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise DataError(
                f"a checkpoint needs {_size(needed)}, {self.folder} has {_size(free)} free; free some space, or lower "
                f"checkpoint.keep_last. The newest whole checkpoint is {self.latest_step or 'none'}"
            )

    def save(self, step: int, *, state: dict, data: dict) -> None:
        """Returns once the arrays may change; they are written in the background, one checkpoint at a time.

        data: plain JSON values. Every process of the run calls it. Raises DataError where the disk is full, or where
        writing the one before has failed.
        """
        self.wait()
        self.check_space(state)
        folder = self.folder / str(step)
        if jax.process_index() == 0 and folder.exists():
            # Not whole, or of a part of the run that was given up.
            (folder / "run.json").unlink(missing_ok=True)
        response = ocp.save_checkpointables_async(folder, {"state": state}, overwrite=True)
        data = {"format": FORMAT, "step": step, "groups": parameter_shapes(state)} | data
        # Not a daemon: the interpreter ends after it.
        self._thread = threading.Thread(target=self._finish, args=(response, step, data), name="checkpoint")
        self._thread.start()

    def _finish(self, response, step: int, data: dict) -> None:
        try:
            response.result()
            if jax.process_index() == 0:
                self._make_whole(step, data)
        except BaseException as e:
            self._failure = e

    def _make_whole(self, step: int, data: dict) -> None:
        folder = self.folder / str(step)
        files = {str(p.relative_to(folder)): p.lstat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
        write_bytes(folder / "run.json", json.dumps(data | {"files": files}).encode())
        steps = self.steps
        for old in steps[: -self._keep_last]:
            if not (self._keep_every and old % self._keep_every == 0):
                (self.folder / str(old) / "run.json").unlink()
                shutil.rmtree(self.folder / str(old), ignore_errors=True)

    def wait(self) -> None:
        """Until the last save is whole. Raises DataError where it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise DataError(
                f"a checkpoint could not be written to {self.folder}: {one_line(failure)[:300]}; mend the storage and "
                f"run the same command again. The newest whole checkpoint is {self.latest_step or 'none'}"
            ) from failure

    @property
    def saving(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def data(self, step: int | None = None) -> dict:
        """What is stored beside the arrays. Raises RequestError without a checkpoint, or for another format."""
        step = self.latest_step if step is None else step
        if step is None:
            more = "".join(f" ({line})" for line in self.faults()[-1:])
            raise RequestError(f"no whole checkpoint in {self.folder}{more}; train first")
        try:
            data = json.loads((self.folder / str(step) / "run.json").read_text(encoding="utf-8"))
        except FileNotFoundError as e:
            raise RequestError(
                f"checkpoint {step} of {self.folder} is not there; all machines of a run must see its directory"
            ) from e
        if data["format"] != FORMAT:
            raise RequestError(f"checkpoint {step} has format {data['format']}, this version reads {FORMAT}")
        return data

    def state(self, abstract: dict, *, step: int | None = None) -> dict:
        """The arrays that ``abstract`` names, a part of what is stored or all of it.

        abstract: jax.ShapeDtypeStruct leaves with the shardings they shall have. Raises RequestError where the arrays
        cannot be read.
        """
        step = self.latest_step if step is None else step
        folder = self.folder / str(step)
        _refuse_links(folder)
        loading = ocp.options.PyTreeOptions.Loading(partial_load=True)
        try:
            with ocp.Context(pytree_options=ocp.options.PyTreeOptions(loading=loading)):
                return ocp.load_checkpointables(folder, {"state": abstract})["state"]
        # Whatever Orbax makes of bytes that are not what was written; its own message hides the first cause.
        except Exception as e:
            raise RequestError(
                f"checkpoint {step} is damaged ({one_line(e.__cause__ or e)[:200]}); move {folder} away to go on from "
                "the one before"
            ) from e

    def close(self) -> None:
        """Waits for the save under way, without a word on how it ends."""
        if self._thread is not None:
            self._thread.join()


def _bytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def parameter_shapes(state: dict) -> dict[str, dict[str, list[int]]]:
    """Group → path of a parameter → its shape."""
    return {
        group: {jax.tree_util.keystr(path): list(x.shape) for path, x in jax.tree.leaves_with_path(value["params"])}
        for group, value in state.items()
    }


def _refuse_links(folder: Path) -> None:
    """The storage library follows symbolic links, so a checkpoint from elsewhere could read any file."""
    links = [p for p in [folder, *folder.rglob("*")] if p.is_symlink()]
    if links:
        raise RequestError(f"checkpoint: expected plain files, found the symbolic link {links[0]}")
