"""The commands that look after data: import, check, preprocess."""

from __future__ import annotations

import argparse

from pipeline.cli.arguments import add_recipe_arguments, make_parser, positive, step_range
from pipeline.commands import command
from pipeline.credentials import redacted, redacted_values
from pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEST, RequestError
from pipeline.files import make_folder
from pipeline.ray_job import check_outlives
from pipeline.stopping import Stop
from pipeline.store.path import run_path, user_path
from pipeline.waiting import waiting_for


def import_parser() -> argparse.ArgumentParser:
    from pipeline.data.importers import help_text

    parser = make_parser(
        command("import"),
        "Write the Parquet manifest of a data set in a public layout. Media stay where they are.",
        epilog="layouts:\n" + help_text(),
    )
    parser.add_argument("layout", metavar="LAYOUT", help="how the data lie, see below")
    parser.add_argument("source", metavar="SOURCE", help="folder or file; s3://, gs:// and other URIs too")
    parser.add_argument(
        "--out", type=user_path, required=True, metavar="FILE", help="the manifest to write, e.g. data/train.parquet"
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
    parser.set_defaults(job=_import)
    return parser


def _import(arguments: argparse.Namespace, stop: Stop) -> int:
    from pipeline.data.importers import import_layout

    check_outlives(arguments.out, "--out")
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


def check_parser() -> argparse.ArgumentParser:
    check = command("check")
    parser = make_parser(
        check,
        "Look at a recipe's data before a run: rows, a decoded sample of them, captions, labels, the overlap of\n"
        "held-out and training data, and the CPUs that decoding needs.\n"
        "With --replay: run logged steps of a run again from a checkpoint, here and now, and compare their results.",
        epilog=f"""\
examples:
  {check} --config pets.yaml
  {check} --config pets.yaml --sample 2000 --json > check.json
  {check} --config pets.yaml --html check.html
  {check} --replay runs/pets --steps 4001:4100

exit codes: 0 usable, or equal; 1 failed, or a step differs; 2 a run would stop, or a wrong request; 75 stopped""",
    )
    add_recipe_arguments(parser, required=False)
    parser.add_argument(
        "--replay", metavar="RUN", help="a run's directory, in place of --config; nothing is written there"
    )
    parser.add_argument(
        "--steps", type=step_range, metavar="FIRST:LAST", help="the steps to replay, as metrics.jsonl counts them"
    )
    parser.add_argument(
        "--sample", type=int, default=200, metavar="ROWS", help="rows to decode of each data set (default: 200)"
    )
    parser.add_argument(
        "--step-s",
        type=float,
        metavar="SECONDS",
        help="seconds of a training step to keep up with (default: an estimate for this machine)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    parser.add_argument(
        "--html", type=user_path, metavar="FILE", help="also write a page with samples as the model will see them"
    )
    parser.set_defaults(job=_check)
    return parser


def _check(arguments: argparse.Namespace, stop: Stop) -> int:
    import json

    from pipeline import recipe as recipes

    if arguments.replay or arguments.steps:
        return _replay(arguments)
    if arguments.config is None:
        raise RequestError("--config: expected a recipe to look at, or --replay RUN --steps FIRST:LAST")
    if arguments.sample < 1 or (arguments.step_s is not None and arguments.step_s <= 0):
        raise RequestError("--sample and --step-s: expected more than 0")
    recipe = recipes.load(arguments.config, arguments.overrides)
    if arguments.html:
        make_folder(arguments.html.absolute().parent, "--html in")
    with waiting_for("the look at the data"):
        from pipeline.check import check, print_check

        result = redacted_values(check(recipe, sample=arguments.sample, step_s=arguments.step_s, page=arguments.html))
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        print_check(result)
    return EXIT_DONE if result["usable"] else EXIT_REQUEST


def _replay(arguments: argparse.Namespace) -> int:
    import dataclasses
    import json

    if not (arguments.replay and arguments.steps) or arguments.config:
        raise RequestError(
            "expected --replay RUN with --steps FIRST:LAST and without --config: the recipe is the run's; --set may "
            "say where its data are now"
        )
    with waiting_for("libraries to load"):
        from pipeline.replay import replay

    result = replay(run_path(arguments.replay, option="--replay"), *arguments.steps, overrides=arguments.overrides)
    print(json.dumps(dataclasses.asdict(result), indent=1) if arguments.json else "\n".join(result.lines()))
    return EXIT_DONE if result.difference is None else EXIT_FAILED


def preprocess_parser() -> argparse.ArgumentParser:
    preprocess = command("preprocess")
    parser = make_parser(
        preprocess,
        "Decode the data sets of a recipe once into Arrow shards, to train from them many times with the same batches.",
        epilog=f"""\
examples:
  {preprocess} --config pets.yaml --out /data/shards
  {command("pretrain")} --config pets.yaml --set data_sets.pets.shards=/data/shards/pets

The same command again goes on where it stopped.

{command("import")} LAYOUT SOURCE --out FILE writes the manifest of a data set in a public layout;
{command("import")} --help lists the layouts.

exit codes: 0 done, 1 failed, 2 the request was wrong, 75 stopped: run it again""",
    )
    add_recipe_arguments(parser)
    parser.add_argument(
        "--out", type=user_path, required=True, metavar="FOLDER", help="folder of the shards, one subfolder a data set"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="only this data set; may be repeated"
    )
    parser.add_argument(
        "--rows-per-shard", type=positive, default=256, metavar="ROWS", help="rows of one file (default: 256)"
    )
    parser.set_defaults(job=_preprocess)
    return parser


def _preprocess(arguments: argparse.Namespace, stop: Stop) -> int:
    from pipeline import recipe as recipes

    recipe = recipes.load(arguments.config, arguments.overrides)
    check_outlives(arguments.out, "--out")
    with waiting_for("libraries to load"):
        from pipeline.preprocess import preprocess

    preprocess(
        recipe,
        arguments.out.absolute(),
        only=tuple(arguments.only),
        rows_per_shard=arguments.rows_per_shard,
        stop=stop,
    )
    return EXIT_DONE
