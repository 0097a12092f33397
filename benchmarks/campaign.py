"""Faults without end: runs are broken in every way at random moments, and must end with the bits of a run left alone.

    python -m benchmarks.campaign --seed 1 (--rounds 100 | --minutes 60) [--form bare|driver|worker|nodes] [--publish]

Each run is broken again and again and started again by the same command, or goes on by itself where it must. At its
end losses, sample ids and parameters are compared to the bit. All lines are kept in --folder: the same command goes
on where an interrupted campaign was. --publish adds what was compared since the last time to docs/campaign.md.
JSON on standard output; exit status 1 if anything differs or did not come back.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import statistics
import sys
import time
from pathlib import Path

from benchmarks.campaign_episode import Episode, Log, product_commit
from benchmarks.campaign_faults import local_cluster
from benchmarks.campaign_run import FORMS, MARK, ROOT, Site, marked, say

PAGE = ROOT / "docs/campaign.md"
# How often a run has a form.
_WEIGHTS = {"bare": 6.0, "driver": 3.0, "worker": 3.0, "nodes": 1.0}
_HEAD = "| date | commit | form | faults | unequal | not back | restart p50, p99 | going on p50, p99 |"


def form_of(seed: int, number: int, only: str | None) -> str:
    """The form of one run of a campaign."""
    names = list(_WEIGHTS)
    return only or random.Random(f"{seed}/{number}").choices(names, list(_WEIGHTS.values()))[0]


def rounds_of(lines: list[dict], episode: dict) -> list[dict]:
    """The faults of a run that has been compared."""
    key = ("seed", "episode", "form", "commit")
    return [line for line in lines if line["event"] == "round" and all(line[k] == episode[k] for k in key)]


def percentiles(values: list[float]) -> list[float] | None:
    """Median and 99th percentile, None without values."""
    if not values:
        return None
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
    return [round(cuts[49], 1), round(cuts[98], 1)]


def summary(lines: list[dict], episodes: list[dict]) -> dict:
    """Counts and times of these runs, all of which were compared."""
    rounds = [line for episode in episodes for line in rounds_of(lines, episode)]
    kinds = collections.Counter(line["kind"] for line in rounds)
    ended = [r for r in rounds if "restart_s" in r]
    return {
        "faults": len(rounds),
        "runs": len(episodes),
        "unequal": sum(bool(e["unequal"]) for e in episodes),
        "troubles": sum(len(e["troubles"]) for e in episodes),
        "restart_s": percentiles([r["restart_s"] for r in ended]),
        "went_on_s": percentiles([r["went_on_s"] for r in rounds if "went_on_s" in r and r["kind"] != "node"]),
        "lost node, s": percentiles([r["went_on_s"] for r in rounds if "went_on_s" in r and r["kind"] == "node"]),
        # A run that only starts has lost what the fault before it cost.
        "steps lost to SIGTERM, at most": max(
            (r["lost"] for r in ended if r["kind"] == "sigterm" and r["when"] != "starting"), default=None
        ),
        "tracebacks": dict(collections.Counter(r["kind"] for r in rounds if r.get("traceback"))),
        "kinds": dict(kinds.most_common()),
    }


def publish(log: Log, page: Path) -> None:
    """Adds a row to the page for each form and commit, of the runs compared since the last time."""
    lines = log.lines()
    done = max((n for n, line in enumerate(lines) if line["event"] == "published"), default=-1)
    fresh = [line for line in lines[done + 1 :] if line["event"] == "episode"]
    groups: dict[tuple, list[dict]] = collections.defaultdict(list)
    for episode in fresh:
        groups[episode["commit"], episode["form"]].append(episode)
    rows = [_row(commit, form, summary(lines, group)) for (commit, form), group in sorted(groups.items())]
    if not rows:
        return
    text = page.read_text(encoding="utf-8")
    head, found, rest = text.partition(_HEAD)
    if not found:
        raise SystemExit(f"{page}: expected the table's head {_HEAD!r}")
    table, _, after = rest.partition("\n\n")
    page.write_text(f"{head}{_HEAD}{table.rstrip()}\n" + "\n".join(rows) + f"\n\n{after}".rstrip() + "\n")
    log.write("published", rows=len(rows))


def _row(commit: str, form: str, found: dict) -> str:
    def times(pair: list[float] | None) -> str:
        return f"{pair[0]}, {pair[1]} s" if pair else "–"

    return (
        f"| {time.strftime('%Y-%m-%d')} | {commit} | {form} | {found['faults']} in {found['runs']} runs | "
        f"{found['unequal']} | {found['troubles']} | {times(found['restart_s'])} | "
        f"{times(found['lost node, s'] if form == 'nodes' else found['went_on_s'])} |"
    )


def campaign(site: Site, log: Log, *, seed: int, rounds: int | None, minutes: float | None, form: str | None) -> None:
    """Plays runs until the number of faults or the time is reached."""
    deadline = time.time() + 60 * minutes if minutes else float("inf")
    begun = time.time()

    def enough() -> bool:
        made = sum(line["event"] == "round" and line["at"] >= begun for line in log.lines())
        return time.time() >= deadline or (rounds is not None and made >= rounds)

    while not enough():
        commit = product_commit()
        done = {
            line["episode"]
            for line in log.lines()
            if line["event"] == "episode" and (line["seed"], line["commit"]) == (seed, commit)
        }
        number = next(n for n in range(1 << 30) if n not in done and (form is None or form_of(seed, n, None) == form))
        chosen = FORMS[form_of(seed, number, None)]
        with local_cluster(chosen.nodes) as cluster:
            Episode(site, chosen, log, seed=seed, number=number, cluster=cluster).play(enough)


def clear_up(site: Site) -> None:
    """Ends what an interrupted campaign has left: its processes, and runs of other commits."""
    for pid in marked(f"{MARK}={site.folder}"):
        os.kill(pid, 9)
    commit = product_commit().replace("*", "+")
    for path in site.disk.iterdir():
        if not path.name.endswith(f"-{commit}"):
            shutil.rmtree(path, ignore_errors=True)
    (site.disk / "ballast").unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--form", choices=tuple(FORMS))
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache/imp-campaign")
    parser.add_argument("--publish", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["JAX_PLATFORMS"] = "cpu"
    site = Site(args.folder.absolute())
    log = Log(site.folder / "campaign.jsonl")
    if args.rounds or args.minutes:
        clear_up(site)
        site.server.start()
        try:
            campaign(site, log, seed=args.seed, rounds=args.rounds, minutes=args.minutes, form=args.form)
        finally:
            site.server.stop()
    if args.publish:
        publish(log, PAGE)
    lines = log.lines()
    found = summary(lines, [line for line in lines if line["event"] == "episode"])
    print(json.dumps(found, indent=1))
    say(f"all lines: {site.folder / 'campaign.jsonl'}")
    sys.exit(bool(found["unequal"] or found["troubles"]))


if __name__ == "__main__":
    main()
