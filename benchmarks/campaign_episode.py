"""One run of a campaign: broken again and again, started again by the same command, compared at its end."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.campaign_bits import bits, unequal
from benchmarks.campaign_faults import Kind, LocalCluster, Round, await_save, kinds_of
from benchmarks.campaign_run import ROOT, Form, Launch, Site, Went, last_step, say
from pipeline.errors import EXIT_DONE, EXIT_RUN_AGAIN

# Seconds within which a run must make a step after a fault or a start, however busy the machine.
BACK_S = 240.0
# Seconds within which a run must end that was told to.
_END_S = 150.0
# Number of troubles after which a run is given up.
_MAX_TROUBLES = 3


def product_commit() -> str:
    """The last commit that changed the product, not its tests or benchmarks; a star after it: changed since."""

    def git(*words: str) -> str:
        found = subprocess.run(["git", *words, "--", *parts], cwd=ROOT, capture_output=True, text=True, check=False)
        return found.stdout.strip()

    parts = ("pipeline", "model", "jobs")
    return (git("log", "-1", "--format=%h") or "unknown") + "*" * bool(git("status", "--porcelain"))


class Log:
    """The campaign's lines, from which an interrupted one goes on."""

    def __init__(self, path: Path):
        self._path = path

    def lines(self) -> list[dict]:
        """All whole lines."""
        text = self._path.read_text() if self._path.exists() else ""
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def write(self, event: str, **values: object) -> None:
        """Appends one line."""
        with open(self._path, "a") as file:
            print(json.dumps({"event": event, "at": round(time.time(), 1)} | values), file=file, flush=True)


def reference(site: Site, form: Form, commit: str, cluster: LocalCluster | None) -> dict:
    """The bits of the run left alone, made once for each form and commit. Raises RuntimeError if it fails."""
    path = site.folder / f"reference-{form.name}-{commit.replace('*', '+')}.json"
    if path.exists():
        return json.loads(path.read_text())
    run_dir = site.folder / f"whole-{form.name}"
    shutil.rmtree(run_dir, ignore_errors=True)
    launch = Launch(site, form, run_dir, address=cluster and cluster.address)
    try:
        went = launch.first_step(timeout_s=BACK_S)
        code = launch.ended(BACK_S)
    finally:
        launch.kill()
    if code != EXIT_DONE or went is None:
        raise RuntimeError(f"the run left alone ended with {code}: {launch.said()[-3000:]}")
    say(f"{form.name}: left alone, first step after {went.at - launch.began:.1f} s")
    found = bits(run_dir)
    path.write_text(json.dumps(found))
    return found


class Episode:
    """A run in one form. seed and number: of all its random choices."""

    def __init__(self, site: Site, form: Form, log: Log, *, seed: int, number: int, cluster: LocalCluster | None):
        self._site, self._form, self._log, self._cluster = site, form, log, cluster
        self._commit = product_commit()
        self._key = {"seed": seed, "episode": number, "form": form.name, "commit": self._commit}
        self.run_dir = site.disk / f"{form.name}-{seed}-{number}-{self._commit.replace('*', '+')}"
        mine = [line for line in log.lines() if all(line.get(k) == v for k, v in self._key.items())]
        self._rounds = [line for line in mine if line["event"] in ("round", "skipped")]
        self._next = 1 + max((line["round"] for line in self._rounds), default=-1)
        self._troubles = [line["trouble"] for line in self._rounds if line.get("trouble")]
        self._launch: Launch | None = None
        # The last fault, whose restart has not been measured yet.
        self._open: dict | None = None
        self._may_end = False

    def play(self, enough: Callable[[], bool]) -> None:
        """Goes on until the run has ended and is compared, or until ``enough()``."""
        expected = reference(self._site, self._form, self._commit, self._cluster)
        self._launch = self._start()
        self._may_end = True
        try:
            while not enough():
                if not self._round():
                    self._settle(None)
                    self._finish(expected)
                    return
        finally:
            self._launch.kill()

    def _start(self) -> Launch:
        self._may_end = False
        return Launch(self._site, self._form, self.run_dir, address=self._cluster and self._cluster.address)

    def _round(self) -> bool:
        """Injects one fault and runs the same command again. Returns False once the run has ended, or is given up."""
        draw = random.Random(f"{self._key['seed']}/{self._key['episode']}/{self._next}")
        kinds = kinds_of(self._form.name, self._site)
        kind = draw.choices(kinds, [k.weight for k in kinds])[0]
        when = draw.choices(("starting", "steps", "save"), (1, 4, 2))[0]
        if not self._await_moment(when, draw):
            return self._goes_on_after_end()
        since, step = time.time(), last_step(self.run_dir)
        at = Round(self._site, self._launch, draw, self._cluster)
        number, self._next = self._next, self._next + 1
        if not kind.inject(at):
            self._note("skipped", round=number, kind=kind.name)
            return True
        record = {"round": number, "kind": kind.name, "when": when, "step": step} | (
            {"note": at.note} if at.note else {}
        )
        say(f"{self._form.name} {self._key['episode']}.{number}: {kind.name}, {when}, step {step} {at.note}")
        return self._recovered(kind, record, since if kind.ends is False else time.time())

    def _await_moment(self, when: str, draw: random.Random) -> bool:
        """Waits for the moment of a fault. False if the run ended before."""
        launch = self._launch
        if when == "starting" and self._open is not None:
            launch.ended(draw.uniform(0.0, self._form.start_s))
            self._settle(None)
            return launch.running()
        if self._open is not None or last_step(self.run_dir) == 0:
            went = launch.first_step(timeout_s=BACK_S)
            self._settle(went)
            if went is None and launch.running():
                return False
        target = last_step(self.run_dir) + draw.randint(1, self._form.gap)
        launch.wait(lambda: last_step(self.run_dir) >= target, BACK_S)
        if when == "save":
            await_save(launch, 20.0)
        return launch.running()

    def _settle(self, went: Went | None) -> None:
        """Writes the record of the last fault, with the time of its restart where that is known."""
        record, self._open = self._open, None
        if record is None:
            return
        if went is not None:
            record["restart_s"] = round(went.at - self._launch.began, 2)
            record["lost"] = max(0, record.pop("last") - (went.start or 0))
        self._note("round", **record)

    def _goes_on_after_end(self) -> bool:
        """The run has ended between two faults: at its end, late after a fault, or for no reason that is known."""
        code = self._launch.ended(0.0)
        if code == EXIT_DONE:
            return False
        how = f"no step within {BACK_S:.0f} s of a start" if code is None else f"ended with {code} between faults"
        why, late = f"{how}: {_last_line(self._launch)}", self._may_end and code is not None
        self._note("late" if late else "trouble", **({"why": why} if late else {"trouble": why}))
        if not late:
            self._troubles.append(why)
        self._launch.kill()
        self._launch = self._start()
        return len(self._troubles) < _MAX_TROUBLES

    def _recovered(self, kind: Kind, record: dict, since: float) -> bool:
        """Waits for a step after a fault, in a new launch if the old one has ended."""
        launch = self._launch
        if kind.ends:
            code = launch.ended(_END_S)
            # Python takes signals only once it has been imported.
            allowed = (EXIT_DONE, EXIT_RUN_AGAIN) + (-signal.SIGTERM,) * (record["when"] == "starting")
            if code is None or (kind.name in ("sigterm", "gcs") and code not in allowed):
                record["trouble"] = f"did not end with {EXIT_RUN_AGAIN}, but {code}: {_last_line(launch)}"
        else:
            went = launch.went_on(since, timeout_s=BACK_S)
            code = launch.ended(0.0)
            if went is not None:
                record["went_on_s"] = round(went.at - since, 2)
            if code is None and went is None:
                record["trouble"] = f"no step within {BACK_S:.0f} s: {_last_line(launch)}"
            elif code not in (None, EXIT_DONE) and kind.ends is False:
                record["trouble"] = f"ended with {code}: {_last_line(launch)}"
        return self._after(kind, record, code)

    def _after(self, kind: Kind, record: dict, code: int | None) -> bool:
        launch = self._launch
        if record.get("trouble"):
            self._troubles.append(record["trouble"])
        if "Traceback (most recent" in launch.said():
            record["traceback"] = True
        if self._cluster is not None:
            self._cluster.fill()
        self._may_end |= kind.ends is None
        if code == EXIT_DONE or (code is None and not record.get("trouble")):
            self._note("round", **record)
            return code is None
        if code is None:
            launch.kill()
        self._open = record | {"code": code, "last": last_step(self.run_dir)}
        self._launch = self._start()
        return len(self._troubles) < _MAX_TROUBLES

    def _note(self, event: str, **values: object) -> None:
        self._log.write(event, **self._key, **values)

    def _finish(self, expected: dict) -> None:
        """Compares the run with the one left alone, and writes the result down."""
        left = self._launch.leavings()
        if left:
            self._troubles.append(f"{len(left)} processes outlived the run: {left[0][:200]}")
        try:
            differs = unequal(bits(self.run_dir), expected)
        except Exception as e:
            differs = [f"cannot be compared: {type(e).__name__}: {e}"[:300]]
        self._log.write("episode", **self._key, unequal=differs, troubles=self._troubles)
        say(f"{self._form.name} {self._key['episode']}: {'; '.join(differs + self._troubles) or 'equal bit for bit'}")
        if differs or self._troubles:
            shutil.copytree(self.run_dir, self._site.folder / "kept" / self.run_dir.name, dirs_exist_ok=True)
        shutil.rmtree(self.run_dir, ignore_errors=True)


def _last_line(launch: Launch) -> str:
    lines = launch.said().strip().splitlines() or [""]
    return lines[-1][:300]
