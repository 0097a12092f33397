"""The findings at the head of a report."""

from __future__ import annotations

import numpy as np

from pipeline.report.learning import at_chance, losses_at_chance
from pipeline.report.run_files import Run, first_and_last_tenth, shares
from pipeline.report.values import mapping, number

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
    tenths = {name: first_and_last_tenth(run.metrics.values("loss", task=name)[1]) for name in run.tasks}
    guessing = losses_at_chance(run)
    fell = [name for name, (first, last) in tenths.items() if last < first and name not in guessing]
    found = [(f"Loss fell on {len(fell)} of {len(run.tasks)} tasks.", len(fell) < len(run.tasks))]
    if guessing:
        found.append((f"Loss still at chance: {', '.join(f'{n} ({c:.4g})' for n, c in guessing.items())}.", True))
    return found


def _updates(run: Run) -> list[Finding]:
    found = []
    lost = ~np.isfinite(run.metrics.all_values("loss"))
    if lost.any():
        names = ", ".join(run.metrics.tasks_where(lost))
        found.append((f"Losses that are not finite: {lost.sum():,}, in {names}.", True))
    skipped = number(run.summary.get("skipped_updates"))
    if skipped > 0:
        found.append((f"Updates skipped because they were not finite: {skipped:,.0f}.", True))
    return found


def _mixture(run: Run) -> list[Finding]:
    outside = [name for name, (share, sigma, actual) in shares(run).items() if abs(actual - share) > 3 * sigma]
    return (
        [(f"More than 3 sigma from their expected share of the steps: {', '.join(outside)}.", True)] if outside else []
    )


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
    if not run.metrics.alarms:
        return []
    step, text = run.metrics.alarms[0]
    return [(f"Alarms: {run.metrics.num_alarms:,}; the first at step {step:,.0f}: {text}.", True)]


def _waits(run: Run) -> list[Finding]:
    step_s, wait_s = (np.nansum(run.metrics.values(key)[1]) for key in ("step_s", "data_wait_s"))
    if not step_s > 0 or not wait_s > 0.1 * (step_s + wait_s):
        return []
    advice = f" — {run.goodput.advice}" if run.goodput and run.goodput.advice else ""
    return [(f"Waiting for data took {wait_s / (step_s + wait_s):.0%} of the logged time{advice}.", True)]
