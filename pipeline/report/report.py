"""The report of a run: one page, made from the files of the run directory, that shows in a minute how the run went."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from pipeline.files import write_bytes
from pipeline.report.data_sets import data
from pipeline.report.elements import Html, duration, escape, tiles
from pipeline.report.experts import experts
from pipeline.report.findings import findings
from pipeline.report.learning import evaluation, loss
from pipeline.report.mixture import mixture, schedules
from pipeline.report.page import page
from pipeline.report.run_files import Run, read_run, steps_done
from pipeline.report.timing import structures, time
from pipeline.report.values import mapping, number
from pipeline.store.path import run_path

# State of a run → CSS class.
_STATES = {"complete": "good", "not finished": "bad", "not known": "quiet"}


def write_report(run_dir: Path) -> Path:
    """Writes ``report.html`` into a run directory, whole or not at all, and returns its path.

    A section without content says "not available".
    """
    run_dir = run_path(run_dir)
    run = read_run(run_dir)
    sections = {name: section(run) for name, section in _SECTIONS.items()}
    text = page(title=f"IMP run: {run_dir.resolve().name}", header=_header(run), sections=sections)
    write_bytes(run_dir / "report.html", text.encode(errors="replace"))
    return run_dir / "report.html"


def _header(run: Run) -> Html:
    done, planned = steps_done(run), number(mapping(run.config.get("train")).get("num_steps"))
    parameters = number(run.summary.get("num_parameters"))
    examples = np.nansum([number(run.task(name).get("examples")) for name in run.tasks])
    state = _state(done, planned)
    facts = {
        "State": Html(f'<span class="{_STATES[state]}">{state}</span>'),
        "Steps": f"{done:,}" + ("" if math.isnan(planned) else f" of {planned:,.0f}"),
        "Model": str(mapping(run.config.get("model")).get("variant", "–")),
        "Parameters": "–" if math.isnan(parameters) else f"{parameters / 1e6:,.1f} M",
        "Wall time": duration(_wall_s(run)),
        "Tasks": str(len(run.tasks)),
        "Examples": f"{examples:,.0f}" if examples else "–",
        "Workers": str(run.summary.get("world_size", "–")),
    }
    notes = [f'<li class="{"bad" if bad else "good"}">{escape(text)}</li>' for text, bad in findings(run)]
    return Html(tiles(facts) + (f'<ul class="findings">{"".join(notes)}</ul>' if notes else ""))


def _state(done: int, planned: float) -> str:
    if math.isnan(planned):
        return "not known"
    return "complete" if done >= planned else "not finished"


def _wall_s(run: Run) -> float:
    """Seconds of all attempts; of a run without a log of them, by the summary or the last step."""
    if run.goodput is not None:
        return run.goodput.up_s
    total = number(mapping(run.summary.get("time")).get("total_s"))
    logged = run.metrics.values("wall_s")[1]
    return float(np.nanmax(logged)) if math.isnan(total) and np.isfinite(logged).any() else total


def _config(run: Run) -> Html:
    if not run.config_text.strip():
        return Html("")
    return Html(f"<details><summary>config.yaml</summary><pre>{escape(run.config_text)}</pre></details>")


_SECTIONS = {
    "Evaluation": evaluation,
    "Loss": loss,
    "Mixture": mixture,
    "Schedules": schedules,
    "Experts": experts,
    "Time": time,
    "Structures": structures,
    "Data": data,
    "Config": _config,
}
