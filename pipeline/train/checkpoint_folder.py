"""The folder of a run's checkpoints: which of them are whole, and which are intact. Reads no arrays.

``checkpoints/<step>/`` holds the arrays and ``run.json``, which is put there last: step, position, class lists,
tokenizer, recipe, and the size and digest of every file, its own too. A folder without it, or without a file that it
lists, is never chosen. A file that differs from its digest is found when the run goes on from a checkpoint, which is
then set aside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import OUT_OF_REACH, DataError, RequestError, one_line
from pipeline.store.objects import StoreError
from pipeline.store.path import ObjectPath, run_path
from pipeline.train.digests import changed_file, cut_file, read_sealed

# Increased when the stored layout changes.
FORMAT = 3
RUN = "run.json"
# The fault of a folder whose save was interrupted.
_NOT_WHOLE = f"{RUN} is missing"
_changed_file = functools.partial(changed_file, besides=RUN)


# Characters that Orbax takes for a pattern in the path of a checkpoint: it would find none of the files that it has
# written, or those of a neighbour, and say nothing.
_PATTERNS = frozenset("*?[]\\")


def check_path(folder: Path) -> None:
    """Raises RequestError if checkpoints below a local folder could not be read again because of its name."""
    if isinstance(folder, ObjectPath):
        return
    path = str(folder.absolute())
    if found := sorted(_PATTERNS.intersection(path)):
        raise RequestError(
            f"{path}: expected a path without {' '.join(found)}, where checkpoints cannot be kept; rename it"
        )


class CheckpointFolder:
    """The checkpoints of a run directory as files."""

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_path(run_dir).absolute() / "checkpoints"

    def _folders(self) -> list[int]:
        """The steps that have a folder, whole or not, ascending."""
        try:
            return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdigit())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as e:
            raise self._out_of_reach(e) from e

    @property
    def steps(self) -> list[int]:
        """The steps of the whole checkpoints, ascending."""
        return [step for step in self._folders() if self._fault(step) is None]

    @property
    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint."""
        # From the newest on: of a long run's many checkpoints only one is examined.
        return next((step for step in reversed(self._folders()) if self._fault(step) is None), None)

    @property
    def best_step(self) -> int | None:
        """The step of the whole checkpoint that the newest names as the best; None without one."""
        step = self.latest_step
        best = (self._read(step).get("best") or {}).get("step") if step is not None else None
        return best if best is not None and self._fault(best) is None else None

    def newest_before(self, step: int) -> int | None:
        """The step of the newest whole checkpoint of less than ``step`` updates."""
        return next((s for s in reversed(self._folders()) if s < step and self._fault(s) is None), None)

    def oldest_from(self, step: int) -> int | None:
        """The step of the oldest whole checkpoint of ``step`` updates or more."""
        return next((s for s in self._folders() if s >= step and self._fault(s) is None), None)

    def damage(self, step: int) -> str | None:
        """What of a checkpoint is not what was written, in words. Reads every byte."""
        return self._fault(step, look=_changed_file)

    @property
    def latest_bytes(self) -> int:
        """The size of the newest whole checkpoint, 0 without one."""
        step = self.latest_step
        return sum(file["bytes"] for file in self.data(step)["files"].values()) if step is not None else 0

    def faults(self) -> list[str]:
        """A line for every folder of a step that is skipped, and why."""
        faults = {step: self._fault(step) for step in self._folders()}
        return [f"checkpoint {step} is skipped: {fault}" for step, fault in faults.items() if fault]

    def _read(self, step: int) -> dict:
        """The run.json of this format or another. Raises OSError, or ValueError if it is corrupt."""
        data, intact = read_sealed(self.folder / str(step) / RUN)
        if intact is False or (intact is None and data.get("format") == FORMAT):
            raise ValueError("checksum mismatch")
        return data

    def _fault(self, step: int, *, look: Callable[[Path, dict], str | None] = cut_file) -> str | None:
        """The reason why a checkpoint is not whole, else None. look: ``cut_file``, or ``changed_file`` to read it."""
        try:
            data = self._read(step)
        except FileNotFoundError:
            return _NOT_WHOLE
        except (OSError, ValueError) as e:
            self._check_reach(e)
            return f"{RUN} cannot be read: {one_line(e)}"
        if data.get("format") != FORMAT:
            return None  # ``data`` refuses it
        if data["step"] != step:
            return f"{RUN} is that of step {data['step']}"
        try:
            return look(self.folder / str(step), data["files"])
        except OSError as e:
            self._check_reach(e)
            return f"a file cannot be read: {one_line(e)}"

    def _check_reach(self, error: Exception) -> None:
        """Raises DataError without an answer of the storage: a checkpoint then is neither whole nor damaged, and a run
        must not go on from an older one."""
        if isinstance(error, StoreError) or (isinstance(error, OSError) and error.errno in OUT_OF_REACH):
            raise self._out_of_reach(error) from error

    def _out_of_reach(self, error: OSError) -> DataError:
        mend = "" if isinstance(error, StoreError) else "mend the storage or its permissions, and "
        return DataError(
            f"the checkpoints of {self.folder} cannot be read: {one_line(error)}; {mend}run the command again"
        )

    def choose(self, *, set_aside: bool = False) -> tuple[int | None, list[str]]:
        """(the newest checkpoint with intact files, a line for each newer one that is damaged).

        set_aside: rename damaged ones, so that they are never considered again; for one process of the run that owns
        them. Raises DataError if all checkpoints are damaged.
        """
        damaged, sound = {}, None
        for step in reversed(self._folders()):
            damage = self._fault(step, look=_changed_file)
            if damage == _NOT_WHOLE:
                continue  # a save that was interrupted
            if damage is None:
                sound = step
                break
            damaged[step] = damage
        if damaged and sound is None:
            step, damage = next(iter(damaged.items()))
            raise DataError(
                f"every checkpoint in {self.folder} is damaged, the newest, {step}, because {damage}; put back a copy "
                "of one, or use another --run-dir to begin anew"
            )
        lines = []
        for step, damage in damaged.items():
            aside = f", is set aside as {self._set_aside(step)}" if set_aside else ""
            lines.append(f"checkpoint {step} is damaged ({damage}){aside}; {sound} takes its place")
        return sound, lines

    def _set_aside(self, step: int) -> Path:
        target, number = self.folder / f"{step}.damaged", 2
        while target.exists():
            target, number = self.folder / f"{step}.damaged-{number}", number + 1
        try:
            return (self.folder / str(step)).rename(target)
        except OSError as e:
            raise DataError(f"checkpoint {step} is damaged and cannot be set aside: {one_line(e)}; move it away") from e

    def last_finite_step(self) -> int | None:
        """The newest whole checkpoint that was saved while updates were finite."""
        return next((step for step in reversed(self.steps) if self._read(step).get("finite")), None)

    def data(self, step: int | None = None) -> dict:
        """The data stored beside the arrays. Raises RequestError without a checkpoint, or for another format."""
        step = self.latest_step if step is None else step
        if step is None:
            more = "".join(f" ({line})" for line in self.faults()[-1:])
            raise RequestError(f"no whole checkpoint in {self.folder}{more}; train first")
        try:
            data = self._read(step)
        except FileNotFoundError as e:
            raise RequestError(
                f"checkpoint {step} of {self.folder} is missing; all machines of a run must see its directory"
            ) from e
        except (OSError, ValueError) as e:
            self._check_reach(e)
            raise RequestError(
                f"checkpoint {step} of {self.folder} is damaged: {RUN} cannot be read: {one_line(e)}"
            ) from e
        if data.get("format") != FORMAT:
            raise RequestError(f"checkpoint {step} has format {data.get('format')}, this version reads {FORMAT}")
        return data
