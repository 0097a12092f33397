"""The command that writes a run's report again, or a page that compares runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.cli.arguments import make_parser, run_folder
from pipeline.commands import command
from pipeline.errors import EXIT_DONE, RequestError
from pipeline.files import make_folder
from pipeline.stopping import Stop
from pipeline.store.path import user_path

# Files by one of which a run directory is known.
_SIGNS = ("config.yaml", "metrics.jsonl")


def report_parser() -> argparse.ArgumentParser:
    report = command("report")
    parser = make_parser(
        report,
        "Write report.html of a run again, from its directory alone, or one page that compares several runs.",
        epilog=f"""\
examples:
  {report} runs/pets
  {report} --compare runs/pets runs/pets-large --out comparison.html

exit codes: 0 done, 1 failed, 2 the request was wrong""",
    )
    parser.add_argument("runs", nargs="+", type=run_folder, metavar="RUN", help="the directory of a run")
    parser.add_argument("--compare", action="store_true", help="write one page about all of the runs")
    parser.add_argument(
        "--out", type=user_path, metavar="FILE", help="the page of --compare (default: comparison.html, here)"
    )
    parser.set_defaults(job=_report)
    return parser


def _report(arguments: argparse.Namespace, stop: Stop) -> int:
    for run in arguments.runs:
        if not any((run / name).is_file() for name in _SIGNS):
            raise RequestError(f"{run}: expected the directory of a run, with {' or '.join(_SIGNS)}; found none")
    if not arguments.compare:
        return _each(arguments)
    if len(arguments.runs) < 2:
        raise RequestError(f"--compare: expected two runs or more, found {arguments.runs[0]} alone")
    from pipeline.report.compare import write_comparison

    out = arguments.out or Path("comparison.html")
    make_folder(out.absolute().parent, "--out in")
    print(f"comparison: {write_comparison(arguments.runs, out)}")
    return EXIT_DONE


def _each(arguments: argparse.Namespace) -> int:
    if arguments.out:
        raise RequestError(f"--out {arguments.out}: expected with --compare; a report is written into its run")
    from pipeline.report.report import write_report

    for run in arguments.runs:
        make_folder(run, "RUN")
        print(f"report: {write_report(run)}")
    return EXIT_DONE
