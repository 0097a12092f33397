"""What the jobs share: arguments, one-line errors, exit codes."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
import time
from pathlib import Path

from pipeline import stopping
from pipeline.credentials import redacted, redacted_values
from pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEST, EXIT_RUN_AGAIN, DataError, RequestError, one_line
from pipeline.files import make_folder
from pipeline.waiting import waiting_for

# Errors of a disk that takes no more: full, over a quota, a limit of file size, read-only.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
ROOT = Path(__file__).resolve().parent.parent


def run_job(job, arguments: argparse.Namespace) -> int:
    """Runs a job and turns its ways of ending into an exit code and at most one line."""
    with stopping.obeyed("stopped; run the same command again") as stop:
        return _run_job(job, arguments, stop)


def _run_job(job, arguments: argparse.Namespace, stop: stopping.Stop) -> int:
    try:
        return job(arguments, stop)
    except RequestError as e:
        _say(f"error: {e}")
        return EXIT_REQUEST
    except DataError as e:
        _say(f"failed: {e}")
        return EXIT_FAILED
    except OSError as e:
        if e.errno not in _FULL:
            raise
        _say(f"failed: {one_line(e)}; free some space or mend the storage, and run the same command again")
        return EXIT_FAILED
    finally:
        # Jobs that need no Ray do not load it.
        if "pipeline.cluster.start" in sys.modules:
            sys.modules["pipeline.cluster.start"].end_ray()
        _let_go_of_closed_terminals()


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)


def _let_go_of_closed_terminals() -> None:
    """The interpreter's last flush to one would turn the exit code into 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _parser(name: str, description: str, *, epilog: str) -> argparse.ArgumentParser:
    """epilog: printed as it is, examples first."""
    return argparse.ArgumentParser(
        prog=name, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_recipe_arguments(
    parser: argparse.ArgumentParser, *, default: Path | None = ROOT / "configs" / "demo.yaml"
) -> None:
    says = "the recipe, a YAML file" + (" (default: configs/demo.yaml)" if default else "")
    parser.add_argument("--config", type=Path, default=default, required=default is None, metavar="FILE", help=says)
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another value for one key of the recipe, e.g. --set train.num_steps=100; may be repeated",
    )


def pretrain_main(argv: list[str]) -> int:
    started = time.time()
    parser = _parser(
        "pretrain.py",
        "Pretrain one encoder on many tasks by a recipe, evaluate it and write a report.",
        epilog="""\
examples:
  python jobs/pretrain.py                                      the demo, into runs/demo
  python jobs/pretrain.py --config pets.yaml --print-config    every key of a recipe with its value
  python jobs/pretrain.py --explain train.clip_norm            what a key means; --explain train: those of a section
  python jobs/pretrain.py --config pets.yaml --set train.num_steps=20000 --set train.learning_rate=3e-4
  python jobs/pretrain.py --config pets.yaml --set cluster.num_workers=2

The same command again goes on where the run stopped, however it stopped. What it may change: cluster.*, logging.*,
checkpoint.*, a larger train.num_steps, and the mixture of tasks where resume.allow_mixture_change is true.
What each key means: --explain KEY, docs/settings.md. What a run leaves behind: README.md.
A second Ctrl-C or SIGTERM ends it at once, without saving (130, 143).

exit codes: 0 done, 1 failed, 2 the request was wrong, 75 stopped with its state saved: run it again""",
    )
    add_recipe_arguments(parser)
    parser.add_argument(
        "--run-dir", type=Path, metavar="FOLDER", help="where the run is kept (default: runs/NAME, after the recipe)"
    )
    parser.add_argument(
        "--explain",
        nargs="?",
        const="",
        metavar="KEY",
        help="print what a key or a section of the recipe means, e.g. train.clip_norm, and stop",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved recipe with every default, and stop"
    )
    arguments = parser.parse_args(argv)
    arguments.started = started
    return run_job(_pretrain, arguments)


def _pretrain(arguments: argparse.Namespace, stop: stopping.Stop) -> int:
    from pipeline import recipe as recipes

    if arguments.explain is not None:
        print(recipes.explain_key(arguments.explain, arguments.config, arguments.overrides))
        return EXIT_DONE
    run_dir = arguments.run_dir or Path("runs") / arguments.config.stem
    recipe = recipes.load(arguments.config, arguments.overrides, run_dir=run_dir)
    if arguments.print_config:
        print(recipes.dump(redacted_values(recipe.to_dict())), end="")
        return EXIT_DONE
    with waiting_for("libraries to load"):
        from pipeline.pretrain import pretrain

    finished = pretrain(recipe, run_dir, started=arguments.started, stop=stop)
    return EXIT_DONE if finished else EXIT_RUN_AGAIN


def preprocess_main(argv: list[str]) -> int:
    if argv[:1] == ["import"]:
        return _import_main(argv[1:])
    parser = _parser(
        "preprocess.py",
        "Decode the data sets of a recipe once into Arrow shards, to train from them many times with the same batches.",
        epilog="""\
examples:
  python jobs/preprocess.py --config pets.yaml --out /data/shards
  python jobs/pretrain.py --config pets.yaml --set data_sets.pets.shards=/data/shards/pets

The same command again goes on where it stopped.

preprocess.py import LAYOUT SOURCE --out FILE writes the manifest of a data set in a public layout;
preprocess.py import --help lists the layouts.

exit codes: 0 done, 1 failed, 2 the request was wrong, 75 stopped: run it again""",
    )
    add_recipe_arguments(parser, default=None)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="folder of the shards, one subfolder a data set"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="only this data set; may be repeated"
    )
    parser.add_argument(
        "--rows-per-shard", type=_positive, default=256, metavar="ROWS", help="rows of one file (default: 256)"
    )
    return run_job(_preprocess, parser.parse_args(argv))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {value}")
    return value


def _preprocess(arguments: argparse.Namespace, stop: stopping.Stop) -> int:
    from pipeline import recipe as recipes
    from pipeline.preprocess import preprocess

    recipe = recipes.load(arguments.config, arguments.overrides)
    preprocess(
        recipe,
        arguments.out.absolute(),
        only=tuple(arguments.only),
        rows_per_shard=arguments.rows_per_shard,
        stop=stop,
    )
    return EXIT_DONE


def _import_main(argv: list[str]) -> int:
    from pipeline.data.importers import help_text

    parser = argparse.ArgumentParser(
        prog="preprocess.py import",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write the Parquet manifest of a data set in a public layout. Media stay where they are.",
        epilog="layouts:\n" + help_text(),
    )
    parser.add_argument("layout", metavar="LAYOUT", help="how the data lie, see below")
    parser.add_argument("source", metavar="SOURCE", help="folder or file; s3://, gs:// and other URIs too")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the manifest to write, e.g. data/train.parquet"
    )
    parser.add_argument(
        "--held-out-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the rows for a second manifest, NAME-held_out.parquet; which ones depends on ids alone",
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the layout; may be repeated"
    )
    return run_job(_import, parser.parse_args(argv))


def _import(arguments: argparse.Namespace, stop: stopping.Stop) -> int:
    from pipeline.data.importers import import_layout

    make_folder(arguments.out.absolute().parent, "--out in")
    options = {}
    for text in arguments.option:
        key, equals, value = text.partition("=")
        if not equals:
            raise RequestError(f"--option {text}: expected KEY=VALUE")
        options[key] = value
    done = import_layout(
        arguments.layout,
        arguments.source,
        arguments.out,
        held_out_share=arguments.held_out_share,
        options=options,
    )
    print(redacted("\n".join(done.lines())))
    return EXIT_DONE


def check_main(argv: list[str]) -> int:
    parser = _parser(
        "check.py",
        "Look at a recipe's data before a run: rows, a decoded sample of them, captions, labels, what is held out and\n"
        "trained on alike, and the CPUs that decoding takes.",
        epilog="""\
examples:
  python jobs/check.py --config pets.yaml
  python jobs/check.py --config pets.yaml --sample 2000 --json > check.json

exit codes: 0 usable, 1 failed, 2 a run would stop, 75 stopped: run it again""",
    )
    add_recipe_arguments(parser)
    parser.add_argument(
        "--sample", type=int, default=200, metavar="ROWS", help="rows to decode of each data set (default: 200)"
    )
    parser.add_argument(
        "--step-s",
        type=float,
        metavar="SECONDS",
        help="a training step that decode must keep up with (default: an estimate for this machine)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    return run_job(_check, parser.parse_args(argv))


def _check(arguments: argparse.Namespace, stop: stopping.Stop) -> int:
    import json

    from pipeline import recipe as recipes
    from pipeline.check import check, print_check

    if arguments.sample < 1 or (arguments.step_s is not None and arguments.step_s <= 0):
        raise RequestError("--sample and --step-s: expected more than 0")
    recipe = recipes.load(arguments.config, arguments.overrides)
    with waiting_for("the look at the data"):
        result = redacted_values(check(recipe, sample=arguments.sample, step_s=arguments.step_s))
    print(json.dumps(result, indent=1)) if arguments.json else print_check(result)
    return EXIT_DONE if result["usable"] else EXIT_REQUEST


def evaluate_main(argv: list[str]) -> int:
    parser = _parser(
        "evaluate.py",
        "Repeat a run's evaluation from its newest checkpoint alone and write eval.json.",
        epilog="""\
examples:
  python jobs/evaluate.py --run runs/pets
  python jobs/evaluate.py --run runs/pets --config more_held_out_sets.yaml

exit codes: 0 done, 1 failed, 2 the request was wrong, 75 stopped: run it again""",
    )
    parser.add_argument("--run", type=Path, required=True, metavar="FOLDER", help="the run's directory")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="a recipe whose evaluate list and held-out sets replace the run's own; its classes must be the same",
    )
    return run_job(_evaluate, parser.parse_args(argv))


def _evaluate(arguments: argparse.Namespace, stop: stopping.Stop) -> int:
    from pipeline import recipe as recipes

    _check_run(arguments.run)
    # What is found in minutes is written there.
    make_folder(arguments.run, "--run")
    from pipeline.evaluate.measure import evaluate_run, print_table
    from pipeline.evaluate.trained_model import TrainedModel
    from pipeline.files import write_json
    from pipeline.prepare import build_corpus

    with waiting_for("the checkpoint to load"):
        model = TrainedModel(arguments.run)
    if arguments.config:
        model.use_recipe(recipes.load(arguments.config))
    build_corpus(model.recipe)
    with waiting_for("the evaluation"):
        results = evaluate_run(arguments.run, model)
    write_json(arguments.run / "eval.json", results)
    print_table(results)
    return EXIT_DONE


def _check_run(run_dir: Path) -> None:
    if not (run_dir / "checkpoints").is_dir():
        raise RequestError(f"--run {run_dir}: expected a run directory with checkpoints, found none")


def export_main(argv: list[str]) -> int:
    parser = _parser(
        "export.py",
        "Write the model of a run's newest checkpoint to a folder: model.safetensors, config.json and the tokenizer.",
        epilog="""\
example:
  python jobs/export.py --run runs/pets --out exported

pipeline.export.load_model reads the folder without Ray; README.md shows how.

exit codes: 0 done, 1 failed, 2 the request was wrong, 75 stopped: run it again""",
    )
    parser.add_argument("--run", type=Path, required=True, metavar="FOLDER", help="the run's directory")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new or an empty folder")
    return run_job(_export, parser.parse_args(argv))


def _export(arguments: argparse.Namespace, stop: stopping.Stop) -> int:
    _check_run(arguments.run)
    from pipeline.export import check_new, save_model

    check_new(arguments.out)
    make_folder(arguments.out.absolute().parent, "--out in")
    from pipeline.evaluate.trained_model import TrainedModel

    with waiting_for("the checkpoint to load"):
        model = TrainedModel(arguments.run)
    save_model(
        arguments.out,
        model.imp,
        model.params,
        step=model.step,
        classes={name: model.data_sets[name].classes for name in model.imp.classifiers},
        tokenizer=model.tokenizer.model if model.tokenizer else None,
    )
    files = ", ".join(sorted(p.name for p in arguments.out.iterdir()))
    print(f"{arguments.out}: the model of step {model.step} ({files})")
    return EXIT_DONE
