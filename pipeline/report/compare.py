"""Several runs on one page: what differs in their recipes, what they reached, their losses over the steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.files import write_bytes
from pipeline.report.charts import Line, line_chart, smooth_line
from pipeline.report.elements import Html, duration, fixed, format_number, grid, quiet, right, table
from pipeline.report.headline import wall_s
from pipeline.report.learning import headline_measurements, measurements
from pipeline.report.page import page
from pipeline.report.run_files import Run, first_and_last_tenth, read_run
from pipeline.report.values import mapping
from pipeline.store.path import run_path

# Maximum number of differing keys of the recipes that are shown, and of characters of a value.
_MAX_KEYS, _MAX_CHARACTERS = 60, 80


def write_comparison(run_dirs: Sequence[Path], path: Path) -> Path:
    """Writes the page, whole or not at all, and returns its path."""
    runs = [read_run(run_path(run_dir)) for run_dir in run_dirs]
    names = _names(run_dirs)
    sections = {name: section(runs, names) for name, section in _SECTIONS.items()}
    header = Html(f'<p class="result">{len(runs)} runs side by side</p>')
    text = page(title="IMP runs: " + ", ".join(names), header=header, sections=sections)
    write_bytes(Path(path), text.encode(errors="replace"))
    return Path(path)


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """The folders' names; with their parents where two are alike."""
    short = [run_path(run_dir).resolve().name for run_dir in run_dirs]
    return short if len(set(short)) == len(short) else [str(run_dir) for run_dir in run_dirs]


def _summary(runs: list[Run], names: list[str]) -> Html:
    rows = []
    for name, run in zip(names, runs, strict=True):
        tests = headline_measurements(run)
        good = f"{sum(one.is_good is True for one in tests)} of {len(tests)}" if tests else "–"
        steps = f"{run.steps_done:,} of {format_number(run.steps_planned)}"
        rows.append((name, run.state, right(steps), right(good), right(duration(wall_s(run)))))
    return table(("Run", "State", "Steps", "Tests above chance", "Time"), rows)


def _evaluations(runs: list[Run], names: list[str]) -> Html:
    """A row for each metric; the best value of a row is bold where higher is better."""
    found = [{(m.data_set, m.task, m.metric): m for m in measurements(run)} for run in runs]
    keys = list(dict.fromkeys(key for each in found for key in each))
    rows = []
    for key in keys:
        values = [each[key].value if key in each else math.nan for each in found]
        chance = next(each[key].chance for each in found if key in each)
        known = [value for value in values if math.isfinite(value)]
        best = max(known) if known and math.isfinite(chance) and len(set(known)) > 1 else math.inf
        cells = [_strong(value, value == best) for value in values]
        rows.append((" ".join(key), *cells, chance))
    return table(("Measured", *names, "Chance"), rows) if rows else Html("")


def _strong(value: float, is_best: bool) -> Html:
    text = format_number(value)
    return Html(f'<b class="number">{text}</b>') if is_best else right(text)


def _losses(runs: list[Run], names: list[str]) -> Html:
    """A chart for each task with a line for each run, and the losses at the end."""
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    end = max((run.metrics.last_step for run in runs), default=0.0)
    charts, rows = [], []
    for task in tasks:
        lines: list[Line] = []
        for i, (name, run) in enumerate(zip(names, runs, strict=True)):
            lines.append(smooth_line(name, run.metrics.series("loss", task=task), number=i))
        charts.append(line_chart(lines, title=task, x_end=end))
        last = [first_and_last_tenth(run.metrics.series("loss", task=task).values)[1] for run in runs]
        rows.append((task, *(fixed(value, ".4g") for value in last)))
    note = quiet("Medians of neighbouring steps, shaded from the lowest to the highest; below: of the last tenth.")
    return Html(note + grid(filter(None, charts)) + table(("Task", *names), rows)) if any(charts) else Html("")


def _recipes(runs: list[Run], names: list[str]) -> Html:
    """The keys in which the recipes differ."""
    found = [dict(_leaves(run.config)) for run in runs]
    keys = list(dict.fromkeys(key for each in found for key in each))
    different = [key for key in keys if len({repr(each.get(key)) for each in found}) > 1]
    if not different:
        return quiet("The recipes are alike.") if any(found) else Html("")
    rows = [(key, *(_short(each.get(key, "–")) for each in found)) for key in different[:_MAX_KEYS]]
    more = quiet(f"The first {_MAX_KEYS} of {len(different)} keys.") if len(different) > _MAX_KEYS else ""
    return Html(more + table(("Key", *names), rows))


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yields (key with its sections, value) of every setting."""
    inner = mapping(value)
    if not inner and path:
        yield path, value
    for key, item in inner.items():
        yield from _leaves(item, f"{path}.{key}" if path else key)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _MAX_CHARACTERS else text[: _MAX_CHARACTERS - 1] + "…"


_SECTIONS = {"Runs": _summary, "Evaluation": _evaluations, "Loss": _losses, "Recipes": _recipes}
