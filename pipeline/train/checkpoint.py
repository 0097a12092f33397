"""Checkpoints: Orbax writes the arrays in the background, ``run.json`` beside them makes a checkpoint whole."""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from pipeline.errors import DataError, RequestError, one_line
from pipeline.files import write_bytes
from pipeline.store.path import ObjectPath, remove_tree
from pipeline.train.agreement import first_of_all_processes
from pipeline.train.checkpoint_folder import FORMAT, RUN, CheckpointFolder, check_path
from pipeline.train.checkpoint_staging import Staging
from pipeline.train.digests import file_digests, sealed

# Orbax warns at each save about a merge of files that a single JSON value does not need, and logs the stacks of all
# threads whose save failed; the failure itself is raised, and said in one line.
logging.getLogger("absl").setLevel(logging.CRITICAL)

# Bytes that must stay free on the disk beside the arrays of a save.
_SPARE_BYTES = 32 << 20


class Checkpoints(CheckpointFolder):
    """The checkpoints of a run directory, to save and to load.

    keep_last: the number of newest ones that are kept; one saved while updates were not finite counts only if there is
    no other. keep_every: those of steps that it divides are kept for ever. The one that the newest names as the best so
    far stays too.
    """

    def __init__(self, run_dir: Path, *, keep_last: int = 2, keep_every: int | None = None) -> None:
        super().__init__(run_dir)
        self._staging = Staging(self.folder) if isinstance(self.folder, ObjectPath) else None
        # The folder in which Orbax reads and writes.
        self._arrays = self._staging.folder if self._staging else self.folder
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def remove_leftovers(self) -> None:
        """Removes the leftovers of saves that were killed. One process calls it, before any saves."""
        for path in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)
        if self._staging:
            self._staging.remove_leftovers()

    def check_space(self, state: dict) -> None:
        """Raises DataError if the disk cannot hold another copy of ``state`` (arrays or their shapes), and RequestError
        for a path that Orbax cannot write to."""
        check_path(self._arrays)
        needed = _bytes(state) + _SPARE_BYTES
        try:
            self._arrays.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self._arrays).free
        except OSError as e:
            raise DataError(f"checkpoints cannot be written to {self._arrays}: {one_line(e)}; mend the storage") from e
        if free < needed:
            raise DataError(
                f"a checkpoint needs {_size(needed)}, {self._arrays} has {_size(free)} free; free some space, or lower "
                f"checkpoint.keep_last. The newest whole checkpoint is {self.latest_step or 'none'}"
            )

    def save(self, step: int, *, state: dict, data: dict, finite: bool = True) -> None:
        """Returns once the arrays may change; they are written in the background, one checkpoint at a time.

        data: plain JSON values. finite: whether the last update of every task was. Every process of the run calls it,
        and all of them raise the same DataError: if the disk is full, or if the previous save failed.
        """
        problem = None
        try:
            self.wait()
            self.check_space(state)
            if self._staging:
                # Before all processes agree: what they put after that is of this save.
                self._staging.prepare(step)
        except DataError as e:
            problem = str(e)
        except OSError as e:
            problem = str(self._unwritable(e))
        if problem := first_of_all_processes(problem):
            raise DataError(problem)
        folder = self._arrays / str(step)
        if jax.process_index() == 0 and not self._staging and folder.exists():
            # Not whole, or of steps that the run has since taken back.
            (folder / RUN).unlink(missing_ok=True)
        params = {name: group["params"] for name, group in state.items()}
        sound = {"finite": bool(_all_finite(params)) and finite}
        with self._staging.options() if self._staging else contextlib.nullcontext():
            response = ocp.save_checkpointables_async(folder, {"state": state}, overwrite=True)
        data = {"format": FORMAT, "step": step, "groups": parameter_shapes(state)} | sound | data
        # Not a daemon: the interpreter waits for it.
        self._thread = threading.Thread(target=self._finish, args=(response, step, data), name="checkpoint")
        self._thread.start()

    def _finish(self, response: ocp.AsyncResponse, step: int, data: dict) -> None:
        try:
            response.result()
            files = self._staging.upload(step) if self._staging else None
            if jax.process_index() == 0:
                self._make_whole(step, data | {"files": files or file_digests(self.folder / str(step))})
        except BaseException as e:
            self._failure = e
            if self._staging:
                self._staging.give_up(step, e)

    def _make_whole(self, step: int, data: dict) -> None:
        folder = self.folder / str(step)
        write_bytes(folder / RUN, sealed(data))
        steps, best = self._in_question(), (data.get("best") or {}).get("step")
        for old in set(steps) - self._kept(steps) - {best}:
            (self.folder / str(old) / RUN).unlink()
            with contextlib.suppress(OSError):
                remove_tree(self.folder / str(old))

    def _in_question(self) -> list[int]:
        """The steps of the whole checkpoints that may have to go, ascending.

        Without old ones that are kept in any case: a long run has many, and examining one takes each of its files.
        """
        found, good = [], 0
        for step in reversed(self._folders()):
            if (good < self._keep_last or not self._is_for_ever(step)) and self._fault(step) is None:
                found.insert(0, step)
                good += bool(self._read(step).get("finite"))
        return found

    def _is_for_ever(self, step: int) -> bool:
        return bool(self._keep_every) and step % self._keep_every == 0

    def _kept(self, steps: list[int]) -> set[int]:
        """The newest, which the run goes on from, ``keep_last`` that are known to be good, and those kept for ever."""
        good = {step: bool(self._read(step).get("finite")) for step in steps}
        best = sorted(steps, key=lambda step: (good[step], step))[-self._keep_last :]
        return {*best, *filter(self._is_for_ever, steps), *steps[-1:]}

    def wait(self) -> None:
        """Waits until the last save is whole. Raises DataError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise self._unwritable(failure) from failure

    def _unwritable(self, failure: BaseException) -> DataError:
        try:
            newest = self.latest_step or "none"
        except DataError:
            newest = "unknown"
        return DataError(
            f"a checkpoint could not be written to {self.folder}: {one_line(failure)[:300]}; mend the storage and run "
            f"the same command again. The newest whole checkpoint is {newest}"
        )

    @property
    def saving(self) -> bool:
        """Whether a save is in progress."""
        return self._thread is not None and self._thread.is_alive()

    def state(self, abstract: dict, *, step: int | None = None) -> dict:
        """The stored arrays that ``abstract`` names, some of them or all.

        abstract: jax.ShapeDtypeStruct leaves with the shardings to load them with. Raises RequestError if the arrays
        cannot be read.
        """
        step = self.latest_step if step is None else step
        if not self._staging:
            return self._load(self.folder / str(step), abstract, step)
        with self._staging.fetched(step, self.data(step)["files"]) as folder:
            return self._load(folder, abstract, step)

    def _load(self, folder: Path, abstract: dict, step: int) -> dict:
        _refuse_links(folder)
        loading = ocp.options.PyTreeOptions.Loading(partial_load=True)
        try:
            with ocp.Context(pytree_options=ocp.options.PyTreeOptions(loading=loading)):
                state = ocp.load_checkpointables(folder, {"state": abstract})["state"]
            jax.tree.map_with_path(_check_form, abstract, state)
        # Orbax raises anything on corrupt bytes, and its message hides the first cause.
        except Exception as e:
            raise RequestError(
                f"checkpoint {step} is damaged ({one_line(e.__cause__ or e)[:200]}); move "
                f"{self.folder / str(step)} away to go on from the one before"
            ) from e
        return state

    def close(self) -> None:
        """Waits for the save in progress and ignores its outcome."""
        if self._thread is not None:
            self._thread.join()


@jax.jit
def _all_finite(params: dict) -> jax.Array:
    """Whether all parameters are finite: a sum over one that is not, is not either, and it compiles in no time."""
    return jnp.isfinite(jnp.stack([jnp.sum(x) for x in jax.tree.leaves(params)])).all()


def _check_form(path, wanted, found) -> None:
    if (wanted.shape, wanted.dtype) != (found.shape, found.dtype):
        raise ValueError(
            f"{jax.tree_util.keystr(path)}: expected {wanted.dtype}{list(wanted.shape)}, "
            f"found {found.dtype}{list(found.shape)}"
        )


def _bytes(tree: dict) -> int:
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
