"""The commands that make a run and hand it on: pretrain, export."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli.arguments import add_recipe_arguments, add_run_argument, add_step_argument, check_run, make_parser
from pipeline.commands import command
from pipeline.credentials import redacted_values
from pipeline.errors import EXIT_DONE, EXIT_RUN_AGAIN, RequestError, some_of
from pipeline.files import make_folder, reach
from pipeline.ray_job import check_outlives
from pipeline.stopping import Stop
from pipeline.store.path import run_path, user_path
from pipeline.waiting import waiting_for

if TYPE_CHECKING:
    from pipeline.evaluate.added_classifier import AddedClassifier
    from pipeline.evaluate.trained_model import EvaluatedModel


def pretrain_parser() -> argparse.ArgumentParser:
    pretrain = command("pretrain")
    parser = make_parser(
        pretrain,
        "Pretrain one encoder on many tasks by a recipe, evaluate it and write a report.",
        epilog=f"""\
examples:
  {pretrain}                                      the demo, into runs/demo
  {pretrain} --config pets.yaml --print-config    every key of a recipe with its value
  {pretrain} --config pets.yaml --set train.num_steps=20000 --set train.learning_rate=3e-4
  {pretrain} --config pets.yaml --set cluster.num_workers=2
  {pretrain} --explain train.clip_norm            the meaning of a key; --explain train: all of a section

The same command again goes on where the run stopped, however it stopped. It may change cluster.*, logging.*,
checkpoint.*, a larger train.num_steps, and the mixture of tasks if resume.allow_mixture_change is true.
Keys: --explain KEY, docs/settings.md. Files of a run: docs/training-and-resume.md.
A second Ctrl-C or SIGTERM ends it at once, without saving (130, 143).

exit codes: 0 done, 1 failed, 2 the request was wrong, 75 stopped with its state saved: run it again""",
    )
    add_recipe_arguments(parser, default="demo")
    parser.add_argument(
        "--run-dir",
        metavar="FOLDER",
        help="where the run is kept, also s3://… or gs://… (default: runs/NAME)",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved recipe with every default, and stop"
    )
    parser.add_argument(
        "--explain",
        nargs="?",
        const="",
        metavar="KEY",
        help="print what a key or a section of the recipe means, e.g. train.clip_norm, and stop",
    )
    parser.set_defaults(job=_pretrain, started=time.time())
    return parser


def _pretrain(arguments: argparse.Namespace, stop: Stop) -> int:
    from pipeline import recipe as recipes

    if arguments.explain is not None:
        print(recipes.explain_key(arguments.explain, arguments.config, arguments.overrides))
        return EXIT_DONE
    run_dir = run_path(arguments.run_dir or Path("runs") / arguments.config.stem)
    reach(run_dir, "--run-dir")
    recipe = recipes.load(arguments.config, arguments.overrides, run_dir=run_dir)
    if arguments.print_config:
        print(recipes.dump(redacted_values(recipe.to_dict())), end="")
        return EXIT_DONE
    check_outlives(run_dir, "--run-dir")
    with waiting_for("libraries to load"):
        from pipeline.pretrain import pretrain

    finished = pretrain(recipe, run_dir, started=arguments.started, stop=stop)
    return EXIT_DONE if finished else EXIT_RUN_AGAIN


def export_parser() -> argparse.ArgumentParser:
    export = command("export")
    parser = make_parser(
        export,
        "Write the model of a run's checkpoint to a folder: model.safetensors, config.json and the tokenizer.",
        epilog=f"""\
example:
  {export} --run runs/pets --out exported --license pets=cc-by-sa-4.0

pipeline.export.load reads the folder without Ray; docs/evaluation-and-use.md shows how.

exit codes: 0 done, 1 failed, 2 the request was wrong, 75 stopped: run it again""",
    )
    add_run_argument(parser)
    add_step_argument(parser)
    parser.add_argument("--out", type=user_path, required=True, metavar="FOLDER", help="a new or an empty folder")
    parser.add_argument(
        "--license",
        action="append",
        default=[],
        metavar="DATA_SET=NAME",
        help='licence of a data set, for the model card (README.md); "unknown" without; once for each',
    )
    probe = parser.add_argument_group("a classifier that the run did not train")
    probe.add_argument("--linear-probe", metavar="FILE", help="labelled rows; it is called after the file")
    probe.add_argument("--data-set", metavar="NAME", help="whose preparation applies, where it differs")
    probe.add_argument("--modality", metavar="NAME", help="image, video, audio, ... (default: the only one)")
    parser.add_argument(
        "--stablehlo", action="store_true", help="also a StableHLO function a modality, for any number of samples"
    )
    parser.set_defaults(job=_export)
    return parser


def _export(arguments: argparse.Namespace, stop: Stop) -> int:
    check_run(arguments.run)
    from pipeline.export import check_new

    check_new(arguments.out)
    if arguments.stablehlo:
        from pipeline.export.stablehlo import check_package

        check_package()
    check_outlives(arguments.out, "--out")
    if arguments.out.is_dir():
        make_folder(arguments.out, "--out")
    else:
        make_folder(arguments.out.absolute().parent, "--out in")
    from pipeline.evaluate.exporting import export_model
    from pipeline.evaluate.trained_model import TrainedModel

    with waiting_for("the checkpoint to load"):
        model = TrainedModel(arguments.run, arguments.step)
    licenses = _licenses(arguments.license, model.data_sets)
    classifier = None
    if arguments.linear_probe:
        with waiting_for("the classifier"):
            classifier = _added_classifier(model, arguments)
    export_model(
        model,
        arguments.out,
        run=arguments.run,
        licenses=licenses,
        stablehlo=arguments.stablehlo,
        classifier=classifier,
    )
    files = ", ".join(sorted(p.name for p in arguments.out.iterdir()))
    print(f"{arguments.out}: the model of step {model.step} ({files})")
    return EXIT_DONE


def _added_classifier(model: EvaluatedModel, arguments: argparse.Namespace) -> AddedClassifier:
    """The classifier of --linear-probe."""
    from pipeline.cli.evaluate_command import measurement_settings
    from pipeline.evaluate.added_classifier import fit_classifier
    from pipeline.evaluate.measurement import measurements

    rows = arguments.linear_probe
    given = {"data_set": arguments.data_set, "modality": arguments.modality}
    entry = {"kind": "linear_probe", "manifest": rows, "fit": rows} | {k: v for k, v in given.items() if v}
    (measurement,) = measurements(model, measurement_settings(model, entry))
    return fit_classifier(model, measurement)


def _licenses(given: list[str], data_sets: Iterable[str]) -> dict[str, str]:
    """Data set → licence. Raises RequestError for anything but DATA_SET=NAME of a known data set."""
    found = {}
    for text in given:
        name, _, license_name = (part.strip() for part in text.partition("="))
        if name not in data_sets or not license_name:
            raise RequestError(f"--license: expected DATA_SET=NAME, DATA_SET of {some_of(data_sets)}, found {text!r}")
        found[name] = license_name
    return found
