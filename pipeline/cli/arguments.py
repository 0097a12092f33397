"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path

from pipeline.errors import RequestError
from pipeline.files import reach
from pipeline.store.path import run_path, user_path

_PACKAGE = Path(__file__).resolve().parent.parent
# Recipes that come with the project: inside an installed package, at the top of a clone.
_RECIPES = next((f for f in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if f.is_dir()), _PACKAGE / "configs")


def make_parser(prog: str, description: str, *, epilog: str) -> argparse.ArgumentParser:
    """epilog: printed as it is, examples first."""
    return argparse.ArgumentParser(
        prog=prog, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def recipe_names() -> list[str]:
    """The recipes that ``--config NAME`` finds."""
    return sorted(path.stem for path in _RECIPES.glob("*.yaml"))


def recipe_file(text: str) -> Path:
    """The file that ``--config`` means: a path, or one of ``recipe_names``."""
    path = user_path(text)
    if path.exists() or path.name != text or path.suffix:
        return path
    names = recipe_names()
    if text in names:
        return _RECIPES / f"{text}.yaml"
    nearest = difflib.get_close_matches(text, names, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise argparse.ArgumentTypeError(f"expected a file or one of {', '.join(names)}; found {text}{hint}")


def add_recipe_arguments(
    parser: argparse.ArgumentParser, *, default: str | None = None, required: bool | None = None
) -> None:
    """default: the recipe's name if --config may be left out. required: by default, if there is no such name."""
    says = "the recipe: a YAML file, or the name of one that comes with imp"
    parser.add_argument(
        "--config",
        type=recipe_file,
        default=recipe_file(default) if default else None,
        required=default is None if required is None else required,
        metavar="FILE",
        help=says + (f" (default: {default})" if default else ""),
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key of the recipe, e.g. --set train.num_steps=100; may be repeated",
    )


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    says = "the run's directory, also s3://… or gs://…"
    parser.add_argument("--run", type=run_folder, required=True, metavar="FOLDER", help=says)


def add_step_argument(parser: argparse.ArgumentParser) -> None:
    """--step: of a checkpoint."""
    parser.add_argument("--step", type=_step, metavar="STEP", help='a checkpoint, or "best" (default: newest)')


def _step(text: str) -> int | str:
    if text == "best":
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f'expected a step or "best", found {text}')
    return int(text)


def run_folder(text: str) -> Path:
    """A run directory, perhaps in a bucket, for argparse."""
    try:
        return run_path(text, option="expected a run:")
    except RequestError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def check_run(run_dir: Path) -> None:
    """Raises RequestError if a folder is not that of a run."""
    reach(run_dir, "--run")
    if not (run_dir / "checkpoints").is_dir():
        raise RequestError(f"--run {run_dir}: expected a run directory with checkpoints, found none")


def step_range(text: str) -> tuple[int, int]:
    """The first and the last step of "5:9", for argparse."""
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"expected FIRST:LAST, e.g. 101:200, found {text}")
    return int(first), int(last)


def positive(text: str) -> int:
    """A number from 1 on, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {value}")
    return value
