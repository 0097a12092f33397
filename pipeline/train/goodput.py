"""Where the time of a run's whole life went, over all its attempts: arithmetic on the log of ``attempts``.

An attempt is one command, or one group of workers where a command has started several. It is counted until it was last
seen; the time from there to the next attempt is ``down``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

from pipeline.train.attempts import last_lines_of_ranks, read_command_and_rank_0
from pipeline.train.wait_advice import RANKS, RankWaits, advice_on_waits

# The parts of the time in which an attempt ran: steps that were kept, and their waits for data; waits for the compiler;
# from the beginning to the first step without its waits; saves; steps that were run again later, with their waits for
# data; from the last step to the end: the last save, evaluation, report; evaluations between steps; and what none of
# these explains.
PARTS = ("steps", "data", "compile", "start", "save", "lost", "end", "evaluate", "other")


@dataclasses.dataclass(slots=True)
class Counters:
    """Sums of an attempt's loop up to a step, in seconds. waits: for data by stage."""

    step: int
    at: float
    steps_s: float = 0.0
    compile_s: float = 0.0
    save_s: float = 0.0
    evaluate_s: float = 0.0
    waits: dict[str, float] = dataclasses.field(default_factory=dict)
    slowest: str | None = None

    @property
    def total_s(self) -> float:
        """The time of the loop."""
        return self.steps_s + self.compile_s + self.save_s + self.evaluate_s + sum(self.waits.values())


@dataclasses.dataclass
class Attempt:
    """One attempt. seen_at: its end, or when it was last seen. outcome: None where it was killed, or still runs.

    start_step: None before its ranks were there. facts: the line that rank 0 wrote then.
    """

    began_at: float
    seen_at: float
    start_step: int | None = None
    facts: dict = dataclasses.field(default_factory=dict)
    counters: list[Counters] = dataclasses.field(default_factory=list)
    outcome: str | None = None

    @property
    def last_step(self) -> int:
        """The last step that it is known to have completed."""
        return self.counters[-1].step if self.counters else self.start_step or 0

    def counters_at(self, step: int) -> Counters:
        """The counters after a step, between two notes in proportion to the steps."""
        if self.counters and step >= self.last_step:
            return self.counters[-1]
        before = Counters(self.start_step or 0, self.began_at)
        for after in self.counters:
            if after.step >= step:
                share = (step - before.step) / max(1, after.step - before.step)
                return _between(before, after, max(0.0, share))
            before = after
        return before


def _between(a: Counters, b: Counters, share: float) -> Counters:
    def mix(x: float, y: float) -> float:
        return x + share * (y - x)

    return Counters(
        step=round(mix(a.step, b.step)),
        at=mix(a.at, b.at),
        steps_s=mix(a.steps_s, b.steps_s),
        compile_s=mix(a.compile_s, b.compile_s),
        save_s=mix(a.save_s, b.save_s),
        evaluate_s=mix(a.evaluate_s, b.evaluate_s),
        waits={name: mix(a.waits.get(name, 0.0), value) for name, value in b.waits.items()},
        slowest=b.slowest,
    )


@dataclasses.dataclass(frozen=True)
class Goodput:
    """The life of a run. parts_s: part → seconds, of ``PARTS``. waits_s: of its part ``data``, by stage.

    rank_waits_s: rank → stage → seconds waited for its own data, in all attempts. wall_s: from the first command to the
    last sign of life, down_s of it between attempts.
    """

    attempts: list[Attempt]
    wall_s: float
    down_s: float
    lost_steps: int
    parts_s: dict[str, float]
    waits_s: dict[str, float]
    rank_waits_s: dict[int, dict[str, float]]
    advice: str | None

    @property
    def up_s(self) -> float:
        """Seconds in which an attempt ran."""
        return self.wall_s - self.down_s

    @property
    def slowest_ranks(self) -> dict[int, float]:
        """Rank → seconds waited for its own data, the longest first."""
        totals = {rank: sum(waits.values()) for rank, waits in self.rank_waits_s.items()}
        return dict(sorted(totals.items(), key=lambda item: -item[1]))

    def values(self) -> dict:
        """For summary.json: seconds, and shares of the time with and without that between attempts."""
        return {
            "wall_s": round(self.wall_s, 3),
            "up_s": round(self.up_s, 3),
            "down_s": round(self.down_s, 3),
            "restarts": len(self.attempts) - 1,
            "lost_steps": self.lost_steps,
            "parts_s": _rounded(self.parts_s),
            "share_of_wall": _shares(self.parts_s | {"down": self.down_s}, self.wall_s),
            "share_of_up": _shares(self.parts_s, self.up_s),
            "data_wait_s": _rounded(self.waits_s),
            "rank_data_wait_s": {str(rank): _rounded(waits) for rank, waits in self.rank_waits_s.items()},
            "slowest_rank": next(iter(self.slowest_ranks), None),
            "advice": self.advice,
        }


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in seconds.items()}


def _shares(parts: dict[str, float], whole: float) -> dict[str, float]:
    return {name: round(value / whole, 5) if whole > 0 else 0.0 for name, value in parts.items()}


def goodput(run_dir: Path, *, now: float | None = None) -> Goodput | None:
    """The life of a run so far; None without a log. now: time.time() where the caller is its last attempt."""
    attempts = _attempts(read_command_and_rank_0(run_dir))
    if not attempts:
        return None
    if now is not None:
        attempts[-1].seen_at = max(now, attempts[-1].seen_at)
    parts, waits, lost_steps = dict.fromkeys(PARTS, 0.0), {}, 0
    for attempt, kept in zip(attempts, _kept_steps(attempts), strict=True):
        lost_steps += max(0, attempt.last_step - kept)
        _add(parts, waits, attempt, kept)
    pairs, ranks = itertools.pairwise(attempts), _ranks(run_dir)
    return Goodput(
        attempts=attempts,
        wall_s=attempts[-1].seen_at - attempts[0].began_at,
        down_s=sum(max(0.0, after.began_at - before.seen_at) for before, after in pairs),
        lost_steps=lost_steps,
        parts_s=parts,
        waits_s=waits,
        rank_waits_s={rank: one.own_s for rank, one in ranks.items()},
        advice=_advice(attempts, parts, waits, ranks),
    )


def _kept_steps(attempts: list[Attempt]) -> list[int]:
    """The last step of each attempt that no later one ran again, at least the step that it started from."""
    kept, later = [], math.inf
    for attempt in reversed(attempts):
        start = attempt.start_step or 0
        kept.insert(0, int(max(start, min(attempt.last_step, later))))
        later = min(later, math.inf if attempt.start_step is None else start)
    return kept


def _add(parts: dict[str, float], waits: dict[str, float], attempt: Attempt, kept: int) -> None:
    """Adds the parts of one attempt. kept: the last step that counts."""
    up_s = max(0.0, attempt.seen_at - attempt.began_at)
    if not attempt.counters:
        # Of a command that trained nothing: an evaluation, or a start that came to nothing.
        parts["end" if attempt.start_step is None and attempt.outcome == "done" else "start"] += up_s
        return
    first, last, good = attempt.counters[0], attempt.counters[-1], attempt.counters_at(kept)
    data_s, good_data_s = sum(last.waits.values()), sum(good.waits.values())
    loop_began_at = max(attempt.began_at, first.at - first.total_s)
    found = {
        "steps": good.steps_s,
        "data": good_data_s,
        "compile": last.compile_s,
        "start": loop_began_at - attempt.began_at,
        "save": last.save_s,
        "evaluate": last.evaluate_s,
        "lost": last.steps_s - good.steps_s + data_s - good_data_s,
        "end": max(0.0, attempt.seen_at - last.at),
    }
    found["other"] = max(0.0, up_s - sum(found.values()))
    for name, value in found.items():
        parts[name] += value
    for name, value in good.waits.items():
        waits[name] = waits.get(name, 0.0) + value


def _attempts(lines: list[dict]) -> list[Attempt]:
    """The attempts that the lines of the command and of rank 0 tell of, in order."""
    attempts: list[Attempt] = []
    for line in lines:
        event, at = line["event"], line["at"]
        if event == "begin" or not attempts or (event == "open" and attempts[-1].start_step is not None):
            attempts.append(Attempt(began_at=at, seen_at=at))
        attempt = attempts[-1]
        attempt.seen_at = max(attempt.seen_at, at)
        if event == "open":
            attempt.start_step, attempt.facts = int(_number(line.get("start_step"))), line
        elif event in ("step", "trained"):
            attempt.counters.append(_counters(line))
        elif event == "end":
            attempt.outcome = str(line.get("outcome"))
    return attempts


def _counters(line: dict) -> Counters:
    waits = line.get("waits")
    slowest = line.get("slowest")
    return Counters(
        step=int(_number(line.get("step"))),
        at=line["at"],
        steps_s=_number(line.get("steps_s")),
        compile_s=_number(line.get("compile_wait_s")),
        save_s=_number(line.get("save_s")),
        evaluate_s=_number(line.get("evaluate_s")),
        waits={str(name): _number(value) for name, value in waits.items()} if isinstance(waits, dict) else {},
        slowest=slowest if isinstance(slowest, str) else None,
    )


def _number(value: object) -> float:
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else 0.0


def _ranks(run_dir: Path) -> dict[int, RankWaits]:
    """Rank → its waits, by its last line in each attempt; none of a run of one rank."""
    found = {rank: list(map(_counters, lines)) for rank, lines in last_lines_of_ranks(run_dir).items()}
    return {rank: _rank_waits(last) for rank, last in found.items()} if len(found) > 1 else {}


def _rank_waits(attempts: list[Counters]) -> RankWaits:
    own: dict[str, float] = {}
    for last in attempts:
        for stage, value in last.waits.items():
            if stage != RANKS:
                own[stage] = own.get(stage, 0.0) + value
    return RankWaits(own, attempts[-1].slowest if attempts else None)


def _advice(
    attempts: list[Attempt], parts: dict[str, float], waits: dict[str, float], ranks: dict[int, RankWaits]
) -> str | None:
    if not waits:
        return None
    latest = next(attempt for attempt in reversed(attempts) if attempt.counters)
    by_task = latest.facts.get("advice")
    return advice_on_waits(
        RankWaits(waits, latest.counters[-1].slowest),
        ranks,
        share=parts["data"] / max(parts["data"] + parts["steps"], 1e-9),
        by_task=by_task if isinstance(by_task, dict) else {},
    )
