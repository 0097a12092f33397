"""The console command ``imp``, and the scripts of ``jobs/``, each of which is one of its commands."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Callable

from pipeline import __version__
from pipeline.cli import (
    data_commands,
    evaluate_command,
    plan_command,
    report_command,
    run_commands,
    search_commands,
)
from pipeline.cli.job import run_job
from pipeline.errors import EXIT_DONE, EXIT_REQUEST


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of a group. parser: makes its parser, whose ``job`` default runs it (``cli.job.Job``)."""

    group: str
    does: str
    parser: Callable[[], argparse.ArgumentParser]


# In the order of --help. Libraries are imported where a command runs: nothing here loads Ray or JAX.
COMMANDS = {
    "import": Command("data", "write the manifest of a data set in a public layout", data_commands.import_parser),
    "check": Command("data", "look at a recipe's data before a run", data_commands.check_parser),
    "preprocess": Command("data", "decode a recipe's data sets once, into shards", data_commands.preprocess_parser),
    "plan": Command("runs", "say what a run will need and cost on any machine", plan_command.plan_parser),
    "pretrain": Command("runs", "train by a recipe, evaluate, write a report", run_commands.pretrain_parser),
    "evaluate": Command("runs", "evaluate a run again, or on any manifest", evaluate_command.evaluate_parser),
    "report": Command("runs", "write a run's report again, or compare runs", report_command.report_parser),
    "export": Command("runs", "write a run's model as safetensors", run_commands.export_parser),
    "embed": Command("use", "embed media and texts into Parquet", search_commands.embed_parser),
    "search": Command("use", "find the embedded items nearest to a text or a file", search_commands.search_parser),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command. argv: the command's name and arguments, those of this process by default."""
    argv = sys.argv[1:] if argv is None else argv
    # jobs/ has no separate script for import.
    if argv[:2] == ["preprocess", "import"]:
        argv = argv[1:]
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
        return EXIT_DONE
    if name == "--version":
        print(f"imp {__version__}")
        return EXIT_DONE
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "imp --help lists the commands"
        print(f"error: imp {name}: no such command; {hint}", file=sys.stderr)
        return EXIT_REQUEST
    arguments = COMMANDS[name].parser().parse_args(rest)
    return run_job(arguments.job, arguments)


def _help() -> str:
    lines = ["usage: imp COMMAND [ARGUMENTS]", "       imp --version"]
    for group in dict.fromkeys(c.group for c in COMMANDS.values()):
        lines += ["", f"{group}:"]
        lines += [f"  {name:12}{c.does}" for name, c in COMMANDS.items() if c.group == group]
    lines += ["", "imp COMMAND --help shows its arguments, with examples.", "A first run: imp pretrain"]
    return "\n".join(lines)
