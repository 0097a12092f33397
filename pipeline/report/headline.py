"""The first lines of a report: one sentence of result, and four numbers."""

from __future__ import annotations

import math

import numpy as np

from pipeline.report.elements import Html, counted, duration, escape, tiles
from pipeline.report.findings import findings
from pipeline.report.learning import Measurement, headline_measurements, tasks_that_learned
from pipeline.report.pictures import first_pictures
from pipeline.report.run_files import Run
from pipeline.report.values import mapping, number

# Words of a measurement by the beginning of its task's name.
_KINDS = {"zero_shot": "{} by text", "classify": "{} by a classifier", "retrieval": "{} found by text and back"}
# The end of a metric's name → the words behind its value.
_METRICS = {"acc1": "right", "recall@1": "found first", "recall@5": "among the first five", "mean_ap": "mAP"}


def header(run: Run) -> Html:
    """The sentence, the numbers, the pictures, and the findings."""
    notes = [f'<li class="{"bad" if bad else "good"}">{escape(text)}</li>' for text, bad in findings(run)]
    first, _, rest = result(run).partition("\n")
    sentence = f'<p class="result">{escape(first)}</p>' + (f'<p class="more">{escape(rest)}</p>' if rest else "")
    pictures = f'<section class="first">{found}</section>' if (found := first_pictures(run)) else ""
    return Html(f'{sentence}{tiles(_numbers(run))}{pictures}<ul class="findings">{"".join(notes)}</ul>')


def result(run: Run) -> str:
    """The result of a run in a sentence, and details behind a line break."""
    state, tests = run.state, headline_measurements(run)
    reached = _steps(run)
    if state == "failed":
        return f"This run failed after {reached}.\n{run.outcome.removeprefix('failed: ') or 'no reason was given'}"
    if state != "complete" or not tests:
        return f"{_STATES[state].format(reached)}\n{_losses(run)}"
    good = sum(one.is_good is True for one in tests)
    best, worst = max(tests, key=_gain), min(tests, key=_gain)
    amount = f"all {len(tests)}" if good == len(tests) else f"{good} of {len(tests)}"
    sentence = f"The model beats guessing in {amount} held-out tests.\nBest: {_words(best)}."
    return sentence + (f" Weakest: {_words(worst)}." if worst is not best else "")


_STATES = {
    "complete": "Training is finished after {}; nothing was evaluated beside chance.",
    "not evaluated": "Training is finished after {}; its evaluation is not there yet.",
    "running": "This run is under way: {} so far.",
    "stopped": "This run was stopped after {} and can go on.",
    "ended without a word": "This run ended without a word after {} (killed?) and can go on.",
    "not known": "After {}:",
}


def _steps(run: Run) -> str:
    planned = run.steps_planned
    return f"{run.steps_done:,}" + ("" if math.isnan(planned) else f" of {planned:,.0f}") + " steps"


def _losses(run: Run) -> str:
    if not len(run.metrics):
        return "No step was logged."
    learned = tasks_that_learned(run)
    return f"The loss is below that of guessing, and falls, on {len(learned)} of {counted(len(run.tasks), 'task')}."


def _gain(one: Measurement) -> float:
    """The part of the way from guessing to always right."""
    return (one.value - one.chance) / (1 - one.chance)


def _words(one: Measurement) -> str:
    kind = next((k for k in _KINDS if one.task.startswith(k)), "")
    subject = one.task.removeprefix(kind).strip("_").replace("_", " ")
    what = _KINDS[kind].format(subject) if kind else one.task.replace("_", " ")
    unit = next((words for name, words in _METRICS.items() if one.metric.endswith(name)), one.metric)
    return f"{one.data_set}, {what}, {_percent(one.value)} {unit} (guessing: {_percent(one.chance)})"


def _percent(value: float) -> str:
    return f"{value:.0%}" if value >= 0.1 or value == 0 else f"{value:.1%}"


def _numbers(run: Run) -> dict[str, str]:
    tests = headline_measurements(run)
    good = sum(one.is_good is True for one in tests)
    learned, tasks = len(tasks_that_learned(run)), len(run.tasks)
    return {
        "Held-out tests above chance": f"{good} of {len(tests)}" if tests else "–",
        "Tasks below the loss of guessing": f"{learned} of {tasks}" if tasks else "–",
        "Steps": _steps(run).removesuffix(" steps"),
        "Time": duration(wall_s(run)),
    }


def wall_s(run: Run) -> float:
    """Seconds of all attempts; of a run without a log of them, by the summary or the last step."""
    if run.goodput is not None:
        return run.goodput.up_s
    total, logged = number(mapping(run.summary.get("time")).get("total_s")), run.metrics.series("wall_s").highest
    return logged if math.isnan(total) else total


def about(run: Run) -> dict[str, str]:
    """The model and its data in a few values."""
    parameters = number(run.summary.get("num_parameters"))
    examples = np.nansum([number(run.task(name).get("examples")) for name in run.tasks])
    return {
        "State": run.state + (f" ({run.outcome})" if run.outcome not in ("", "done", run.state) else ""),
        "Model": str(mapping(run.config.get("model")).get("variant", "–")),
        "Parameters": "–" if math.isnan(parameters) else f"{parameters / 1e6:,.1f} M",
        "Tasks": str(len(run.tasks)),
        "Examples seen": f"{examples:,.0f}" if examples else "–",
        "Workers": str(run.summary.get("world_size", "–")),
        "Seed": str(run.config.get("seed", "–")),
    }
