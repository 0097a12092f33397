"""The section of a report that shows the data: what was used of each data set, and what was rejected."""

from __future__ import annotations

import math

import numpy as np

from pipeline.report.elements import Html, fixed, quiet, table
from pipeline.report.run_files import Run
from pipeline.report.values import mapping, number

# Maximum number of pairs of data set and reason.
_MAX_REASONS = 20


def data(run: Run) -> Html:
    """The section of the data sets and the rejected samples."""
    rejects = mapping(run.summary.get("rejects"))
    tasks: dict[str, list[str]] = {name: [] for name in [*mapping(run.config.get("data_sets")), *rejects]}
    for name in run.tasks:
        tasks.setdefault(run.data_set(name), []).append(name)
    rows = [_data_set_row(run, data_set, users, mapping(rejects.get(data_set))) for data_set, users in tasks.items()]
    columns = ("Data set", "Tasks", "Rows", "Examples used", "Epochs", "Drawn", "Rejected", "Share")
    return Html((table(columns, rows) if rows else "") + _rejected_samples(run))


def _data_set_row(run: Run, data_set: str, tasks: list[str], counts: dict) -> tuple:
    size = max((number(run.task(name).get("rows")) for name in tasks), default=math.nan)
    examples = float(np.nansum([number(run.task(name).get("examples")) for name in tasks]))
    epochs = examples / size if size > 0 else math.nan
    drawn, rejected = number(counts.get("drawn")), number(counts.get("rejected"))
    share = rejected / drawn if drawn > 0 else math.nan
    return data_set, ", ".join(tasks), size, examples, fixed(epochs, ".2f"), drawn, rejected, fixed(share, ".2%")


def _rejected_samples(run: Run) -> Html:
    if run.rejects is None:
        return Html("<p class='quiet'>List of rejects: not available.</p>") if run.tasks else Html("")
    if not run.rejects.count:
        return Html("<p class='quiet'>Nothing was rejected.</p>")
    keys = ("id", "data_set", "source", "reason", "task", "step")
    rows = [["–" if row.get(key) is None else str(row[key]) for key in keys] for row in run.rejects.first]
    count = run.rejects.count
    shown = f"The first {len(rows)} of {count:,}" if count > len(rows) else f"All {len(rows)}"
    more = " The others are in quarantine.parquet." if count > len(rows) else ""
    counted = [(*reason, times) for reason, times in run.rejects.reasons.most_common(_MAX_REASONS)]
    columns = ("Id", "Data set", "Source", "Reason", "Task", "Step")
    return Html(
        f"<h3>Reasons</h3>{table(('Data set', 'Reason', 'Rejects'), counted)}"
        f"<h3>{shown} rejects</h3>{quiet(more) if more else ''}{table(columns, rows)}"
    )
