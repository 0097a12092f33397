"""What steps that were run again give, beside what the run's log says they gave."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from pipeline.train.devices import world
from pipeline.train.goodput import goodput
from pipeline.train.telemetry.expert_loads import layer_means

# Relative difference up to which values are taken as equal where the world is another than the run's: sums over
# devices are then rounded in another order.
_OTHER_WORLD = 1e-5
# What a record holds beside the results of its step.
_NOT_RESULTS = ("step_s", "data_wait_s", "compile_wait_s", "ids")


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first step that differs. values: key → (value in the log, value now). world: what else differs from then."""

    step: int
    task: str
    values: dict[str, tuple]
    world: dict[str, tuple]


@dataclasses.dataclass(frozen=True)
class Replay:
    """What was compared. steps: first and last. checkpoint: the step that it went on from, 0 for the run's start.

    compared: the number of steps with a record. exact: bit for bit. keys: what was compared of each.
    """

    steps: tuple[int, int]
    checkpoint: int
    compared: int
    exact: bool
    keys: list[str]
    difference: Difference | None

    def lines(self) -> list[str]:
        """The result in words."""
        how = "bit for bit" if self.exact else f"within {_OTHER_WORLD:g}: the run had other workers or devices"
        start = f"from checkpoint {self.checkpoint}" if self.checkpoint else "from the start of the run"
        if self.difference is None:
            first, last = self.steps
            return [
                f"equal {how}: steps {first} to {last}, {self.compared} of them logged, replayed {start}",
                f"compared: {', '.join(self.keys)}",
            ]
        found = self.difference
        out = [f"step {found.step} ({found.task}) differs, the first one; replayed {start}, compared {how}"]
        out += [f"  {key}: {then} in the log, {now} now" for key, (then, now) in found.values.items()]
        out += [f"  {key} was {then}, here {now}" for key, (then, now) in found.world.items()]
        if not found.world:
            out.append("  machine and libraries are of the same kinds: look at the hardware, the media and the code")
        return out


class Comparison:
    """Compares records with those of the log until one differs.

    logged: step → its line of the log. compared: the number of records; exact: whether all were compared bit for bit.
    step: the last that was replayed. keys: of the values that were compared, in order.
    """

    def __init__(self, run_dir: Path, logged: dict[int, bytes]) -> None:
        self._logged = logged
        life = goodput(run_dir)
        self._attempts = [a for a in life.attempts if a.start_step is not None] if life else []
        self._here = world()
        self.difference: Difference | None = None
        self.compared, self.exact, self.step = 0, True, 0
        self.keys: dict[str, None] = {}

    def record(self, record: dict) -> None:
        """Takes the record of a step that was replayed."""
        self.step = record["step"]
        logged = _record_of(self._logged.get(self.step))
        if logged is None or self.difference is not None:
            return
        then = self._world_of(self.step)
        exact = all(then.get(name, self._here[name]) == self._here[name] for name in ("world_size", "num_devices"))
        self.exact, self.compared = self.exact and exact, self.compared + 1
        results = {key: value for key, value in record.items() if key not in _NOT_RESULTS}
        results["moe"] = layer_means(record.get("moe", {}))
        # As the log holds them.
        results = json.loads(json.dumps(results))
        found = {key: (logged.get(key), value) for key, value in results.items() if key in logged}
        self.keys |= dict.fromkeys(found)
        values = {key: pair for key, pair in found.items() if not _equal(*pair, exact=exact)}
        if values:
            self.difference = Difference(self.step, record["task"], values, self._changed(then))

    def _world_of(self, step: int) -> dict:
        """The world of the attempt whose record of a step is in the log: the last that began before it."""
        facts = [attempt.facts for attempt in self._attempts if attempt.start_step < step]
        return facts[-1] if facts else {}

    def _changed(self, then: dict) -> dict[str, tuple]:
        then, here = _flat(then), _flat(self._here)
        return {key: (then[key], here[key]) for key in here if key in then and then[key] != here[key]}


def _record_of(line: bytes | None) -> dict | None:
    """The record of a line, None where it is damaged."""
    try:
        return json.loads(line) if line is not None else None
    except ValueError:
        return None


def _flat(facts: dict) -> dict[str, object]:
    libraries = facts.get("libraries")
    return {k: v for k, v in facts.items() if k != "libraries"} | (libraries if isinstance(libraries, dict) else {})


def _equal(then: object, now: object, *, exact: bool) -> bool:
    if isinstance(now, dict) and isinstance(then, dict):
        return then.keys() == now.keys() and all(_equal(then[key], now[key], exact=exact) for key in now)
    if isinstance(now, list) and isinstance(then, list):
        return len(then) == len(now) and all(_equal(a, b, exact=exact) for a, b in zip(then, now, strict=True))
    if exact or not isinstance(now, float) or not isinstance(then, float):
        # As text: a value that is no number equals itself, and -0.0 differs from 0.0.
        return json.dumps(then) == json.dumps(now)
    return abs(then - now) <= _OTHER_WORLD * max(abs(then), abs(now), 1.0) or json.dumps(then) == json.dumps(now)
