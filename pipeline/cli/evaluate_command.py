"""The command that measures a run: evaluate."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli.arguments import add_run_argument, add_step_argument, check_run, make_parser, positive, recipe_file
from pipeline.commands import command
from pipeline.errors import EXIT_DONE, RequestError
from pipeline.files import make_folder
from pipeline.stopping import Stop
from pipeline.store.path import user_path
from pipeline.waiting import waiting_for

if TYPE_CHECKING:
    from pipeline.data.manifest import Manifest
    from pipeline.evaluate.evaluator import PooledRows
    from pipeline.evaluate.trained_model import EvaluatedModel
    from pipeline.recipe import EvaluationSettings

# Options that are keys of an ``evaluate`` entry.
_ENTRY = (
    "manifest",
    "kind",
    "modality",
    "other",
    "data_set",
    "classes",
    "prompts",
    "clips",
    "sizes",
    "fit",
    "baseline",
)


def evaluate_parser() -> argparse.ArgumentParser:
    evaluate = command("evaluate")
    parser = make_parser(
        evaluate,
        "Evaluate a run from a checkpoint alone: its own evaluate list again, or any manifest.",
        epilog=f"""\
examples:
  {evaluate} --run runs/pets                              its own list, into runs/pets/eval.json
  {evaluate} --run runs/pets --manifest birds.parquet --classes birds.txt
  {evaluate} --run runs/pets --manifest clips.parquet --kind retrieval --modality video --other audio
  {evaluate} --run runs/pets --manifest birds.parquet --kind linear_probe --fit birds_train.parquet

Only the head of the manifest's pair of modalities must have been trained. Without --kind: zero_shot with
--classes or where the manifest has no texts, else retrieval.

exit codes: 0 done, 1 failed, 2 the request was wrong, 75 stopped: run it again""",
    )
    parser.usage = f"{evaluate} --run FOLDER [OPTIONS]"
    add_run_argument(parser)
    parser.add_argument(
        "--config", type=recipe_file, metavar="FILE", help="a recipe whose list and held-out sets apply"
    )
    add_step_argument(parser)
    parser.add_argument("--out", type=user_path, metavar="FILE", help="where results go (default: in the run)")
    parser.add_argument("--workers", type=positive, metavar="N", help="share the rows out to N workers of Ray")
    _add_entry_arguments(parser.add_argument_group("one measurement in place of the list"))
    parser.set_defaults(job=_evaluate)
    return parser


def _add_entry_arguments(group: argparse._ArgumentGroup) -> None:
    kinds = ("zero_shot", "classify", "retrieval", "linear_probe", "knn")
    group.add_argument("--manifest", metavar="FILE", help="rows to measure")
    group.add_argument("--data-set", metavar="NAME", help="whose decoding, classes and rows apply")
    group.add_argument("--kind", choices=kinds, metavar="KIND", help=", ".join(kinds))
    group.add_argument("--modality", metavar="NAME", help="image, video, audio, ... (default: the only one)")
    group.add_argument("--other", metavar="NAME", help="that retrieval compares it with (default: text)")
    group.add_argument("--classes", nargs="+", metavar="NAME", help="classes, or a file of them")
    group.add_argument("--prompts", nargs="+", metavar="TEXT", help="prompts with {}, or a file of them")
    group.add_argument("--clips", type=positive, metavar="N", help="windows of a row that are averaged")
    group.add_argument("--sizes", type=positive, nargs="+", metavar="N", help="pixels of the view, a result each")
    group.add_argument("--fit", metavar="FILE", help="rows that probes and baseline learn from")
    group.add_argument("--baseline", action="store_const", const=True, help="also the nearest pixels or sounds")
    group.add_argument(
        "--set",
        dest="keys",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another key of an evaluate entry",
    )


def _evaluate(arguments: argparse.Namespace, stop: Stop) -> int:
    from pipeline import recipe as recipes

    check_run(arguments.run)
    entry = {name: value for name in _ENTRY if (value := getattr(arguments, name)) is not None}
    entry |= dict(recipes.key_value(text) for text in arguments.keys)
    if entry and not entry.keys() & {"manifest", "data_set"}:
        raise RequestError("expected --manifest or --data-set: the rows to measure")
    # Refused now rather than after minutes of evaluation.
    make_folder((arguments.out or arguments.run / "eval.json").absolute().parent, "--out" if arguments.out else "--run")
    from pipeline.corpus import build_corpus
    from pipeline.evaluate.evaluator import Evaluator
    from pipeline.evaluate.measure import default_list, evaluate
    from pipeline.evaluate.showcase import write_showcase
    from pipeline.evaluate.table import print_table
    from pipeline.evaluate.trained_model import TrainedModel
    from pipeline.files import write_json
    from pipeline.report.report import write_report

    with waiting_for("the checkpoint to load"):
        model = TrainedModel(arguments.run, arguments.step)
    if arguments.config:
        model.use_recipe(recipes.load(arguments.config))
    entries = [measurement_settings(model, entry)] if entry else default_list(model)
    build_corpus(model.recipe)
    with contextlib.ExitStack() as parts:
        parts.enter_context(waiting_for("the evaluation"))
        more = {"make": _workers(arguments, model, parts)} if arguments.workers else {}
        results = evaluate(Evaluator(model, **more), entries)
    out = arguments.out or _place(arguments.run, results if entry else None)
    write_json(out, results)
    if out == arguments.run / "eval.json":
        with waiting_for("the report"):
            write_showcase(arguments.run, model)
            write_report(arguments.run)
    print_table(results)
    print(f"all metrics: {out}")
    return EXIT_DONE


def _workers(arguments: argparse.Namespace, model: EvaluatedModel, parts: contextlib.ExitStack) -> PooledRows:
    """Makes features on workers of this machine's Ray, or of the cluster that the recipe or RAY_ADDRESS names."""
    from pipeline.cluster.capacity import cluster_cpus
    from pipeline.cluster.spec import Cluster
    from pipeline.cluster.start import start_ray
    from pipeline.cluster.tasks import ActorPool
    from pipeline.evaluate.workers import model_of, shared_out

    cluster = model.recipe.cluster
    start_ray(Cluster(address=cluster.address), driver_cpus=0)
    gpus = cluster.accelerators_per_worker if cluster.accelerator == "gpu" else 0
    make = model_of(arguments.run.absolute(), model.step)
    pool = ActorPool(make, num_actors=arguments.workers, cpus=cluster_cpus() / arguments.workers, gpus=gpus)
    parts.callback(pool.close)
    return shared_out(pool.map, num_workers=arguments.workers)


def _place(run_dir: Path, own: list[dict] | None) -> Path:
    """The file of results. own: those of a user's measurement, which leave the run's eval.json as it is."""
    if own is None:
        return run_dir / "eval.json"
    folder = run_dir / "evaluations"
    folder.mkdir(exist_ok=True)
    name = f"{own[0]['dataset'].replace('/', '-')}-{own[0]['task']}"
    place = folder / f"{name}.json"
    if place.exists() and _manifest_of(place) != own[0]["manifest"]:
        # Another manifest of the same name keeps its results.
        digest = hashlib.sha256(own[0]["manifest"].encode()).hexdigest()[:8]
        return folder / f"{name}-{digest}.json"
    return place


def _manifest_of(results: Path) -> str | None:
    try:
        return json.loads(results.read_bytes())[0]["manifest"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def measurement_settings(model: EvaluatedModel, entry: dict) -> EvaluationSettings:
    """A measurement whose kind and modality follow from its rows where they are not named."""
    from pipeline import recipe as recipes

    for name in ("classes", "prompts"):
        words = entry.get(name, [])
        # One word is a file if it exists.
        if len(words) == 1 and user_path(words[0]).is_file():
            entry[name] = words[0]
    if not {"modality", "kind"} <= entry.keys():
        entry = _from_rows(model, entry) | entry
    settings = recipes.evaluation_settings(entry)
    recipes.check_evaluation("evaluate", settings, model.recipe)
    return settings


def _from_rows(model: EvaluatedModel, entry: dict) -> dict:
    manifest = _rows(model, entry)
    media = [m for m in model.embedders if m in manifest.columns and m not in ("text", entry.get("other"))]
    if len(media) != 1 and "modality" not in entry:
        found = ", ".join(media) or f"none of {', '.join(m for m in model.embedders if m != 'text')}"
        raise RequestError(f"expected --modality, one of the manifest's: found {found}")
    wants_classes = "classes" in entry or ("text" not in manifest.columns and "other" not in entry)
    return {"modality": next(iter(media), None), "kind": "zero_shot" if wants_classes else "retrieval"}


def _rows(model: EvaluatedModel, entry: dict) -> Manifest:
    from pipeline.data.manifest import Manifest
    from pipeline.recipe import specs

    columns = tuple(m for m in model.embedders if m not in ("image", "video", "audio", "text"))
    if "manifest" in entry:
        return Manifest(specs.locate(entry["manifest"]), media=columns)
    held_out = model.data_sets[entry["data_set"]].held_out if entry["data_set"] in model.data_sets else {}
    if not held_out:
        raise RequestError(f"--data-set {entry['data_set']}: expected one with held-out rows; found none of that name")
    return Manifest(next(iter(held_out.values())), media=columns)
