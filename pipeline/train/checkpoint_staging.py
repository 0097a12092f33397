"""Checkpoints of a run in a bucket: Orbax writes and reads a folder of this machine, and the files go to and fro.

Orbax has no driver for S3, and one for Google's store only with packages of its own. So each process saves to its own
disk and puts the files that it wrote; the bucket then holds the same files as a run directory on a disk, and a copy of
one is the other. Processes on several machines share no disk: process 0 merges their indices in the bucket, as Orbax
does in a folder, which rewrites no array.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import tensorstore
from orbax.checkpoint import v1 as ocp

from pipeline.errors import DataError, one_line
from pipeline.files import cache_dir
from pipeline.store.objects import StoreError
from pipeline.store.path import ObjectPath, local_folder
from pipeline.train.checkpoint_folder import RUN
from pipeline.train.digests import digest_of

# Bytes after which Orbax begins another file: each is sent from memory in one request.
_FILE_BYTES = 256 << 20
# Maximum number of files that are sent or fetched at a time.
_AT_A_TIME = 4
# Seconds between two looks for the files of other processes, and until they count as lost.
_POLL_S, _PATIENCE_S = 0.5, 1800.0
# Folder of the files' digests, one object a process, until ``run.json`` holds them.
_PARTS = "parts"
# Beginning of the names of folders for copies to read.
_READ = "read-"
_STATE, _PROCESS = "state", "ocdbt.process_"
# Files of the index over all processes' arrays, within the folder of the state.
_INDEX = ("manifest.ocdbt", "d/")


class Staging:
    """The folder of this machine for the checkpoints in ``target``, which all its processes share."""

    def __init__(self, target: ObjectPath) -> None:
        self._target = target
        self.folder = local_folder(target, cache_dir())

    def options(self) -> ocp.Context:
        """Orbax's settings for a save: files of bounded size, and none that one process waits for on another's disk."""
        context = ocp.Context()
        context.array.saving.ocdbt_target_data_file_size = _FILE_BYTES
        if jax.process_count() > 1:
            context.array.saving.array_metadata_store = None
            context.array.saving.enable_post_merge_validation = False
        return context

    def remove_leftovers(self) -> None:
        """Removes local copies, and from the bucket the saves that were not finished."""
        shutil.rmtree(self.folder, ignore_errors=True)
        names = self._target.names()
        steps = {name.partition("/")[0] for name in names if name.partition("/")[0].isdigit()}
        for step in sorted(steps):
            if f"{step}/{RUN}" not in names:
                (self._target / step).remove_all()

    def prepare(self, step: int) -> None:
        """Removes what an earlier save of a step left, here and in the bucket: not whole, or taken back since."""
        for folder in self._folders(step):
            shutil.rmtree(folder / _STATE / f"{_PROCESS}{jax.process_index()}", ignore_errors=True)
        if jax.process_index() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            (self._target / str(step) / RUN).unlink(missing_ok=True)
            (self._target / str(step)).remove_all()
        self.folder.mkdir(parents=True, exist_ok=True)

    def upload(self, step: int) -> dict[str, dict] | None:
        """Puts this process's files. Process 0 returns the digests of all once they are there, the others None."""
        files = self._put(step, self._own_files(step))
        if jax.process_count() > 1:
            self._put_part(step, {"files": files})
            files = self._of_all(step) if jax.process_index() == 0 else None
        if jax.process_index() == 0 or not (self.folder / str(step)).exists():
            for folder in self._folders(step):
                shutil.rmtree(folder, ignore_errors=True)
        return files

    def give_up(self, step: int, error: BaseException) -> None:
        """Tells process 0, which waits for this one's files, that they will not come."""
        if jax.process_count() > 1 and jax.process_index():
            with contextlib.suppress(OSError):
                self._put_part(step, {"error": one_line(error, limit=300)})

    @contextlib.contextmanager
    def fetched(self, step: int, files: dict[str, dict]) -> Iterator[Path]:
        """Yields a folder with a copy of a checkpoint, which no other process uses. files: name → digest.

        Raises StoreError without an answer, DataError if a file has changed.
        """
        mine = f"{_READ}{socket.gethostname()}-"
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        for old in self.folder.parent.glob(f"{mine}*"):
            # Of a process that was killed.
            if not Path("/proc", old.name.removeprefix(mine).partition("-")[0]).exists():
                shutil.rmtree(old, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f"{mine}{os.getpid()}-", dir=self.folder.parent) as folder:
            self._get(step, files, Path(folder))
            yield Path(folder)

    def _get(self, step: int, files: dict[str, dict], folder: Path) -> None:
        def get(name: str) -> None:
            path = folder / name
            content = (self._target / str(step) / name).read_bytes()
            if digest_of(content) != files[name]:
                raise DataError(f"checkpoint {step} of {self._target} is damaged: {name} has changed")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

        _for_each(get, files)

    def _folders(self, step: int) -> list[Path]:
        """The folders of a step here: with several machines, only process 0's has its final name."""
        return [self.folder / str(step), *self.folder.glob(f"{step}.orbax-checkpoint-tmp*")]

    def _own_files(self, step: int) -> dict[str, Path]:
        """Name → file of what this process has to put."""
        found = {
            path.relative_to(folder).as_posix(): path
            for folder in self._folders(step)
            for path in folder.rglob("*")
            if path.is_file()
        }
        if jax.process_count() == 1:
            return found
        mine = f"{_STATE}/{_PROCESS}{jax.process_index()}/"
        if jax.process_index():
            return {name: path for name, path in found.items() if name.startswith(mine)}
        index = tuple(f"{_STATE}/{name}" for name in _INDEX)
        return {
            n: p for n, p in found.items() if n.startswith(mine) or not n.startswith((f"{_STATE}/{_PROCESS}", *index))
        }

    def _put(self, step: int, files: dict[str, Path]) -> dict[str, dict]:
        digests = {}

        def put(name: str) -> None:
            content = files[name].read_bytes()
            digests[name] = digest_of(content)
            (self._target / str(step) / name).write_bytes(content)

        _for_each(put, files)
        return {name: digests[name] for name in sorted(digests)}

    def _put_part(self, step: int, value: dict) -> None:
        name = f"{jax.process_index():06d}.json"
        (self._target / str(step) / _PARTS / name).write_bytes(json.dumps(value).encode())

    def _of_all(self, step: int) -> dict[str, dict]:
        """The digests of all processes' files, whose indices it merges."""
        parts, files = self._target / str(step) / _PARTS, {}
        deadline = time.monotonic() + _PATIENCE_S
        while len(parts.names()) < jax.process_count():
            if time.monotonic() > deadline:
                raise StoreError(f"only {len(parts.names())} of {jax.process_count()} processes have put their files")
            time.sleep(_POLL_S)
        for path in list(parts.iterdir()):
            part = json.loads(path.read_bytes())
            if "error" in part:
                raise StoreError(part["error"])
            files |= part["files"]
        self._target.store.check_owner(self._target.key)
        merge(self._target / str(step) / _STATE, sorted({n.split("/")[1] for n in files if f"/{_PROCESS}" in n}))
        parts.remove_all()
        for name in self._target.joinpath(str(step)).names():
            if name not in files:
                files[name] = digest_of((self._target / str(step) / name).read_bytes())
        return files


def merge(state: ObjectPath, processes: list[str]) -> None:
    """Makes the index over the arrays that processes have put: it refers to their files, which stay as they are."""

    def database(path: ObjectPath, **options: dict) -> tensorstore.KvStore:
        spec = {"driver": "ocdbt", "base": path.store.base(f"{path.key}/")} | options
        return tensorstore.KvStore.open(spec, context=path.store.context).result()

    # As Orbax merges: values stay in the processes' files.
    whole = database(state, config={"max_inline_value_bytes": 0})
    transaction = tensorstore.Transaction(atomic=True)
    try:
        copies = [
            database(state / name).experimental_copy_range_to(whole.with_transaction(transaction)) for name in processes
        ]
        for copy in copies:
            copy.result()
        transaction.commit_async().result()
    except ValueError as e:
        raise StoreError(f"the arrays of {len(processes)} processes cannot be merged: {one_line(e, limit=300)}") from e


def _for_each(function: Callable[[str], None], names: Iterable[str]) -> None:
    with concurrent.futures.ThreadPoolExecutor(_AT_A_TIME) as pool:
        for future in [pool.submit(function, name) for name in names]:
            future.result()
