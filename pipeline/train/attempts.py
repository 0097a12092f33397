"""The log of a run's attempts: when each began, where its time went, until when it was seen, how it ended.

``attempts/command.jsonl`` is written by the command, ``attempts/rank-N.jsonl`` by each rank. Lines are only appended,
so a process that is killed leaves all but its last moments. ``goodput`` adds them up.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.credentials import redacted
from pipeline.errors import one_line
from pipeline.store.log import ObjectLog, lines_from_end
from pipeline.store.path import ObjectPath, run_path

FOLDER = "attempts"
# Minimum seconds between two lines of steps, and their minimum share of the time since the attempt began: what a kill
# leaves unknown is a hundredth of the attempt at most, and one of weeks has a thousand lines. Ranks other than 0 matter
# for their sums alone.
_EVERY_S, _EVERY_SHARE = 0.1, 0.01
_OTHERS_EVERY_S, _OTHERS_EVERY_SHARE = 10.0, 0.05
# Seconds between two times that a line can tell apart.
_RESOLUTION_S = 1e-6
# The beginning of a line that begins an attempt.
_OPEN = b'{"event": "open"'
# Maximum number of characters of the reason for an end.
_MAX_REASON = 200


class AttemptFile:
    """One file of the log. began: time.time() of the start of what writes it; its clock never jumps after that.

    Nor do those of the command and of rank 0 begin before the last line of either, since their lines are put in order:
    clocks are set back, and machines' differ. ahead_s: seconds that are added to this machine's clock. clock_off_s:
    seconds by which it is ahead of that of the command's machine, which all lines go by.
    """

    def __init__(self, path: Path, *, began: float | None = None, clock_off_s: float = 0.0) -> None:
        self._path = path
        self._wall, self._counter = time.time() - clock_off_s, time.perf_counter()
        self.began = self._wall if began is None else began
        last, ahead_s = _last_time(path.parent) if path in _command_and_rank_0(path.parent) else (0.0, 0.0)
        self.ahead_s = 0.0
        if self._wall <= last:
            self.ahead_s = max(ahead_s, last + _RESOLUTION_S - self._wall)
            self._wall += self.ahead_s
            self.began = max(last + _RESOLUTION_S, self.began + self.ahead_s)
        self._log: ObjectLog | None = None

    def now(self) -> float:
        """Seconds since the epoch."""
        return self._wall + time.perf_counter() - self._counter

    def write(self, event: str, *, at: float | None = None, **values: object) -> None:
        """Appends one line. A disk that takes no more ends the run elsewhere, not here."""
        line = {"event": event, "at": round(self.now() if at is None else at, 6)} | values
        with contextlib.suppress(OSError):
            if isinstance(self._path, ObjectPath):
                return self._put(self._path, json.dumps(line).encode() + b"\n", wait=event != "step")
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "ab", buffering=0) as file:
                # A kill or a full disk may have cut off the last line.
                file.write(b"\n" * _is_cut_off(self._path) + json.dumps(line).encode() + b"\n")

    def _put(self, path: ObjectPath, line: bytes, *, wait: bool) -> None:
        self._log = self._log or ObjectLog(path)
        self._log.append(line)
        if wait:
            self._log.sync()


def _last_time(folder: Path) -> tuple[float, float]:
    """(time of the last line of the command and of rank 0, ``ahead_s`` of the last command); 0 without any."""
    command, rank = _command_and_rank_0(folder)
    last = max((line["at"] for path in (command, rank) for line in itertools.islice(_from_end(path), 1)), default=0.0)
    ahead = next((line.get("ahead_s") for line in _from_end(command) if line["event"] == "begin"), None)
    return last, ahead if _is_time(ahead) else 0.0


def _from_end(path: Path) -> Iterator[dict]:
    """The lines of ``read_file``, the last one first: a run of many attempts has hundreds of thousands."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        for _, text in lines_from_end(file):
            if line := _line(text):
                yield line


def _command_and_rank_0(folder: Path) -> tuple[Path, Path]:
    return folder / "command.jsonl", folder / "rank-0.jsonl"


def _is_cut_off(path: Path) -> bool:
    with open(path, "rb") as file:
        if not file.seek(0, os.SEEK_END):
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


class RankAttempt:
    """One rank's part of an attempt, from the moment that this object is made.

    facts: plain values on the world, the machine and its libraries, kept with the attempt. clock_off_s: of
    ``AttemptFile``.
    """

    def __init__(self, run_dir: Path, *, rank: int, start_step: int, facts: dict, clock_off_s: float = 0.0) -> None:
        self._file = AttemptFile(run_path(run_dir) / FOLDER / f"rank-{rank}.jsonl", clock_off_s=clock_off_s)
        self._every = (_OTHERS_EVERY_S, _OTHERS_EVERY_SHARE) if rank else (_EVERY_S, _EVERY_SHARE)
        self._written_at = -math.inf
        self._file.write("open", at=self._file.began, start_step=start_step, **facts)

    def step(self, step: int, times: dict) -> None:
        """Notes a step that was completed, if the last note is old enough. times: of ``loop.Times.values``."""
        now, (every_s, share) = self._file.now(), self._every
        if now - self._written_at >= max(every_s, share * (now - self._file.began)):
            self._written_at = now
            self._file.write("step", at=now, step=step, **times)

    def trained(self, step: int, times: dict) -> None:
        """Notes that the loop has ended, after ``step`` steps of the run."""
        self._file.write("trained", step=step, **times)


class CommandAttempt:
    """A command's part of its attempts. outcome: how it ended, in a word."""

    def __init__(self, file: AttemptFile) -> None:
        self._file = file
        self.outcome = "done"

    def seen(self) -> None:
        """Notes that the command is alive."""
        self._file.write("seen")


@contextlib.contextmanager
def command_attempt(run_dir: Path, *, began: float, facts: dict | None = None) -> Iterator[CommandAttempt]:
    """Notes when a command began, and how and when the block ended. began: time.time(). facts: kept with it."""
    file = AttemptFile(run_dir / FOLDER / "command.jsonl", began=began)
    facts_and_clock = ({"facts": facts} if facts else {}) | ({"ahead_s": file.ahead_s} if file.ahead_s else {})
    file.write("begin", at=file.began, **facts_and_clock)
    attempt = CommandAttempt(file)
    try:
        yield attempt
    except BaseException as e:
        attempt.outcome = f"failed: {redacted(one_line(e))[:_MAX_REASON]}"
        raise
    finally:
        file.write("end", outcome=attempt.outcome)


def read_file(path: Path) -> list[dict]:
    """The whole lines of one file of the log, in order; empty without it."""
    lines = []
    with contextlib.suppress(OSError), path.open("rb") as file:
        lines = [line for text in file if (line := _line(text))]
    return lines


def _line(text: bytes) -> dict | None:
    """A line of the log; None where it is cut off or foreign."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    known = isinstance(line, dict) and isinstance(line.get("event"), str) and _is_time(line.get("at"))
    return line if known else None


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def command_facts(run_dir: Path) -> list[dict]:
    """The facts of each command that began (``command_attempt``), the latest last."""
    lines = read_file(Path(run_dir) / FOLDER / "command.jsonl")
    return [facts for line in lines if line["event"] == "begin" and isinstance(facts := line.get("facts"), dict)]


def read_command_and_rank_0(run_dir: Path) -> list[dict]:
    """The lines of the command and of rank 0, in the order of their times."""
    lines = [line for path in _command_and_rank_0(run_path(run_dir) / FOLDER) for line in read_file(path)]
    return sorted(lines, key=lambda line: line["at"])


def saved_step(run_dir: Path, *, every: int) -> int:
    """A step of which the log proves that a checkpoint held it; 0 without proof. every: steps between two saves."""
    saved, last = 0, 0
    for line in read_command_and_rank_0(run_dir):
        if line["event"] == "open":
            saved = max(saved, _count(line.get("start_step")))
        elif line["event"] in ("step", "trained"):
            last = max(last, _count(line.get("step")))
        elif str(line.get("outcome")).startswith(("done", "stopped")):
            saved = max(saved, last)
    # A save begins once the one before is whole.
    return max(saved, (last - 1) // every * every - every)


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0


def last_lines_of_ranks(run_dir: Path) -> dict[int, list[dict]]:
    """Rank → the last line of each of its attempts. Parses no other: there may be hundreds of ranks and attempts."""
    paths = (run_path(run_dir) / FOLDER).glob("rank-*.jsonl")
    numbers = {path: path.stem.removeprefix("rank-") for path in paths}
    return {int(n): _last_lines(path) for path, n in sorted(numbers.items()) if n.isdecimal()}


def _last_lines(path: Path) -> list[dict]:
    found, last = [], b""
    with contextlib.suppress(OSError), path.open("rb") as file:
        for text in file:
            if text.startswith(_OPEN):
                found.append(last)
            # The last line of a killed process may be cut off.
            last = text if text.endswith(b"}\n") else last
        found.append(last)
    return [line for text in found if (line := _line(text))]
