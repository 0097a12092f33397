"""The findings at the head of a report."""

from __future__ import annotations

import collections

import numpy as np

from pipeline.report.learning import at_chance, losses_at_chance, tasks_that_learned
from pipeline.report.mixture import shares
from pipeline.report.run_files import Run
from pipeline.report.values import mapping, number

# Minimum share of the steps' time that waits for data take before they are a finding.
_WAIT_SHARE = 0.1
# A sentence, and whether it is bad news.
Finding = tuple[str, bool]


def findings(run: Run) -> list[Finding]:
    """The findings of a run, in order of the page."""
    if not len(run.metrics):
        return [("No step was logged.", True)]
    return [
        *_losses(run),
        *_updates(run),
        *_mixture(run),
        *_evaluation(run),
        *_rejects(run),
        *_alarms(run),
        *_waits(run),
    ]


def _losses(run: Run) -> list[Finding]:
    fell, guessing = tasks_that_learned(run), losses_at_chance(run)
    found = [(f"Loss fell on {len(fell)} of {len(run.tasks)} tasks.", len(fell) < len(run.tasks))]
    if guessing:
        found.append((f"Loss still at chance: {', '.join(f'{n} ({c:.4g})' for n, c in guessing.items())}.", True))
    return found


def _updates(run: Run) -> list[Finding]:
    found = []
    lost = {name: run.metrics.series("loss", task=name).lost for name in run.metrics.tasks}
    if names := [name for name, count in lost.items() if count]:
        found.append((f"Losses that are not finite: {sum(lost.values()):,}, in {', '.join(names)}.", True))
    skipped = number(run.summary.get("skipped_updates"))
    if skipped > 0:
        found.append((f"Updates skipped because they were not finite: {skipped:,.0f}.", True))
    return found


def _mixture(run: Run) -> list[Finding]:
    outside = [name for name, share in shares(run).items() if not share.is_usual]
    names = ", ".join(outside)
    return [(f"Share of the steps that chance does not explain: {names}.", True)] if outside else []


def _evaluation(run: Run) -> list[Finding]:
    guessed = at_chance(run)
    return [(f"Not better than chance: {', '.join(guessed)}.", True)] if guessed else []


def _rejects(run: Run) -> list[Finding]:
    counts = [mapping(item) for item in mapping(run.summary.get("rejects")).values()]
    drawn, rejected = (np.nansum([number(item.get(key)) for item in counts]) for key in ("drawn", "rejected"))
    if not rejected > 0:
        return []
    return [(f"Samples rejected: {rejected:,.0f} of {drawn:,.0f}.", rejected > 0.01 * drawn)]


def _alarms(run: Run) -> list[Finding]:
    """One line a kind: an alarm that was raised again and again is one finding. Waits for data have their own."""
    kinds: dict[str, list[tuple[float, str]]] = collections.defaultdict(list)
    for step, text in run.metrics.alarms:
        # Numbers differ from time to time.
        kinds["".join(c for c in text if not c.isdigit())[:60]].append((step, text))
    found = []
    for raised in kinds.values():
        step, text = raised[0]
        if "waiting for data" not in text:
            times = f", {len(raised)} times" if len(raised) > 1 else ""
            found.append((f"Alarm at step {step:,.0f}{times}: {text}.", True))
    return found


def _waits(run: Run) -> list[Finding]:
    """Of all of the time in steps and their waits, not of a moment of it."""
    step_s, wait_s = (run.metrics.series(key).total for key in ("step_s", "data_wait_s"))
    if not step_s > 0 or not wait_s > _WAIT_SHARE * (step_s + wait_s):
        return []
    advice = f" — {run.goodput.advice}" if run.goodput and run.goodput.advice else ""
    return [(f"Waiting for data took {wait_s / (step_s + wait_s):.0%} of the logged time{advice}.", True)]
