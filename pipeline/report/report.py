"""The report of a run: one page, made from the files of the run directory, that shows in a minute how the run went."""

from __future__ import annotations

import datetime
from pathlib import Path

from pipeline.files import write_bytes
from pipeline.report.data_sets import data
from pipeline.report.elements import Html, escape, facts_list
from pipeline.report.experts import experts
from pipeline.report.headline import about, header
from pipeline.report.learning import evaluation, loss
from pipeline.report.mixture import mixture, schedules
from pipeline.report.page import page
from pipeline.report.pictures import examples, space_and_confusions
from pipeline.report.run_files import Run, read_run
from pipeline.report.timing import structures, time
from pipeline.report.values import mapping
from pipeline.store.path import run_path


def write_report(run_dir: Path) -> Path:
    """Writes ``report.html`` into a run directory, whole or not at all, and returns its path.

    A section without content says "not available".
    """
    run_dir = run_path(run_dir)
    run = read_run(run_dir)
    sections = {name: section(run) for name, section in _SECTIONS.items()}
    if not run.showcase:
        for name in _PICTURES:
            del sections[name]
    text = page(title=f"IMP run: {run.name}", header=header(run), sections=sections)
    write_bytes(run_dir / "report.html", text.encode(errors="replace"))
    return run_dir / "report.html"


def _provenance(run: Run) -> Html:
    """All that is needed to run it again: command, commit, versions, machine, seed."""
    opened = run.goodput.attempts[-1].facts if run.goodput else {}
    facts = about(run)
    for command in run.commands[-1:]:
        names = ("command", "commit", "host", "python", "platform", "cpus", "memory")
        facts |= {name.capitalize(): str(command[name]) for name in names if command.get(name)}
    if run.goodput:
        began = datetime.datetime.fromtimestamp(run.goodput.attempts[0].began_at, datetime.UTC)
        facts["Began"] = f"{began:%Y-%m-%d %H:%M} UTC"
    devices = {"Devices": f"{opened.get('num_devices')} × {opened.get('device')}"} if opened.get("device") else {}
    versions = ", ".join(f"{name} {version}" for name, version in mapping(opened.get("libraries")).items())
    decoding = {"CPU and decoders": str(opened["cpu_kind"])} if opened.get("cpu_kind") else {}
    return facts_list(facts | devices | ({"Versions": versions} if versions else {}) | decoding)


def _config(run: Run) -> Html:
    """Folded on a screen: it is long, and a file of its own."""
    if not run.config_text.strip():
        return Html("")
    return Html(f"<details><summary>config.yaml</summary><pre>{escape(run.config_text)}</pre></details>")


# Sections that only a run with pictures has.
_PICTURES = ("Examples", "Space")
_SECTIONS = {
    "Evaluation": evaluation,
    "Loss": loss,
    "Examples": examples,
    "Space": space_and_confusions,
    "Mixture": mixture,
    "Experts": experts,
    "Time": time,
    "Data": data,
    "Schedules": schedules,
    "Structures": structures,
    "Run": _provenance,
    "Config": _config,
}
