"""The command that says what a run will cost: plan."""

from __future__ import annotations

import argparse
import os

from pipeline.cli.arguments import add_recipe_arguments, make_parser
from pipeline.commands import command
from pipeline.errors import RequestError
from pipeline.stopping import Stop
from pipeline.store.path import user_path
from pipeline.waiting import waiting_for

# Of the TPU compiler, which otherwise asks the machine for a TPU's metadata and logs that there is none.
_NO_TPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def plan_parser() -> argparse.ArgumentParser:
    plan = command("plan")
    parser = make_parser(
        plan,
        "Say what a run will need and cost, before it is started or anything is rented: memory, time, price.",
        epilog=f"""\
examples:
  {plan} --config pets.yaml                                   on the devices at hand
  {plan} --config imp_l_moe --topology v4:4x8x8 --set cluster.expert_parallel=16
  {plan} --config imp_b --gpu h200:8

The steps are compiled as a run compiles them: for the devices at hand, or by the TPU compiler for TPUs that are not
here (pip install 'imp-pretrain[plan]'; minutes a step, kept for the next time). GPUs that are not here are planned by
arithmetic. No data are needed: data_sets.NAME.plan says rows and classes of those that are not here.

exit codes: 0 it fits, 1 it does not fit, 2 the request was wrong""",
    )
    add_recipe_arguments(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--topology", metavar="TPUS", help="e.g. v4:4x8x8, v5e:16x16, v5p:4x4x8")
    where.add_argument("--gpu", metavar="GPUS", help="e.g. h200:8")
    where.add_argument("--here", action="store_true", help="the devices at hand (the default)")
    parser.add_argument("--measure", action="store_true", help="run the planned steps here and compare; with --here")
    parser.add_argument("--all", action="store_true", help="plan every input, not only the largest of each modality")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument(
        "--prices", type=user_path, metavar="FILE", help="YAML of dollars an hour a device, e.g. h200: 7.91"
    )
    numbers = parser.add_argument_group("what a plan cannot know")
    numbers.add_argument("--utilization", type=float, default=0.4, metavar="SHARE", help="of the peak (default: 0.4)")
    numbers.add_argument("--failure-hours", type=float, default=24.0, metavar="N", help="between two (default: 24)")
    numbers.add_argument("--write-gb-s", type=float, default=1.0, metavar="N", help="of a host's saves (default: 1)")
    parser.set_defaults(job=_plan)
    return parser


def _plan(arguments: argparse.Namespace, stop: Stop) -> int:
    if arguments.topology:
        # Read when jax and libtpu are imported. The user's own values stand.
        for name, value in _NO_TPU.items():
            os.environ.setdefault(name, value)
    from pipeline import recipe as recipes

    recipe = recipes.load(arguments.config, arguments.overrides)
    with waiting_for("libraries to load"):
        from pipeline.planning import job

    try:
        assumptions = job.assumptions_of(arguments.utilization, arguments.failure_hours, arguments.write_gb_s)
    except ValueError as e:
        raise RequestError(f"imp plan: {e}") from e
    if arguments.measure and (arguments.topology or arguments.gpu):
        raise RequestError("imp plan: --measure runs steps on the devices at hand: it goes with --here alone")
    machine = job.machine_of(arguments.topology, arguments.gpu, arguments.prices)
    return job.plan_run(
        recipe, machine, assumptions, every=arguments.all, as_lines=not arguments.json, measure=arguments.measure
    )
