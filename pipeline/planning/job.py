"""The job behind ``imp plan``."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from model import sharding
from model.structure import Structure
from pipeline.errors import EXIT_DONE, EXIT_FAILED
from pipeline.files import cache_dir
from pipeline.planning import hardware
from pipeline.planning.hardware import Machine
from pipeline.planning.run_plan import Assumptions, chosen, plan_structures, run_plan, run_schedule, setting_of
from pipeline.planning.structures import Setting, StepPlan, timed_step
from pipeline.planning.text import as_json, comparison, table
from pipeline.planning.timed_step import Measured
from pipeline.recipe import Recipe
from pipeline.train.devices import use_compile_cache
from pipeline.train.memory_fit import MARGIN


def plan_run(
    recipe: Recipe,
    machine: Machine,
    assumptions: Assumptions,
    *,
    every: bool = False,
    as_lines: bool = True,
    measure: bool = False,
) -> int:
    """Plans a recipe for a machine and prints it. Returns 0, or 1 if the run does not fit.

    every: all structures, in place of the largest of each modality. measure: runs them too, and sets what they took
    beside the plan. Plans that are made are kept: the same command
    goes on where it was stopped.
    """
    schedule, setting = run_schedule(recipe), setting_of(recipe, machine)
    structures = chosen(schedule, setting, every=every)
    plans, compile_cache = {}, str(recipe.cluster.compile_cache or cache_dir() / "jax")
    if machine.here:
        use_compile_cache(compile_cache)
    with _alone(machine):
        began = time.monotonic()
        for structure, plan in plan_structures(setting, structures, assumptions, cache=cache_dir() / "plans"):
            plans[structure] = plan
            names = "+".join(i.modality for i in structure.inputs)
            _say(f"planned {len(plans)} of {len(structures)}: {names}, {time.monotonic() - began:.0f} s")
    found = run_plan(setting, schedule, plans, assumptions)
    measured = _measured(setting, plans, compile_cache) if measure else {}
    if as_lines:
        print("\n".join([table(found, assumptions), *comparison(found, measured)]))
    else:
        print(json.dumps(as_json(found, assumptions, measured), indent=1))
    return EXIT_DONE if found.fits else EXIT_FAILED


def _measured(setting: Setting, plans: dict[Structure, StepPlan], compile_cache: str) -> dict[Structure, Measured]:
    """Runs the planned steps that fit, those that take least memory first: an accelerator tells its peak alone."""
    limit, found = setting.machine.device.memory_bytes, {}
    for structure, plan in sorted(plans.items(), key=lambda item: item[1].memory["peak"]):
        if plan.problem or plan.memory["peak"] > (1 - MARGIN) * limit:
            _say(f"not measured, for it does not fit: {plan.memory['peak'] / 2**30:.2f} GiB")
            continue
        _say(f"measuring {'+'.join(i.modality for i in structure.inputs)}")
        if setting.machine.platform == "cpu":
            # Memory that planning has freed and still holds would be used again, and not be seen.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                found[structure] = pool.submit(_measured_here, setting, structure, compile_cache).result()
        else:
            # Two processes cannot share an accelerator.
            found[structure] = _measured_here(setting, structure, compile_cache)
    return found


def _measured_here(setting: Setting, structure: Structure, compile_cache: str) -> Measured:
    use_compile_cache(compile_cache)
    return timed_step(setting, structure, sharding.make_mesh(expert=setting.expert_parallel)).measure()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _alone(machine: Machine) -> Iterator[None]:
    """One process of a machine at a time may hold libtpu: others wait for it here."""
    if machine.platform != "tpu" or machine.here:
        yield
        return
    path: Path = cache_dir() / "libtpu.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another plan holds the TPU compiler: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def machine_of(topology: str | None, gpu: str | None, prices: Path | None) -> Machine:
    """The machine that the command line names; without a name the devices at hand."""
    machine = hardware.tpu(topology) if topology else hardware.gpus(gpu) if gpu else hardware.here()
    return machine if prices is None else hardware.with_prices(machine, prices)


def assumptions_of(utilization: float, hours: float, write_gb_s: float) -> Assumptions:
    """Raises ValueError for numbers out of range."""
    if not (0 < utilization <= 1 and 0 < hours < math.inf and 0 < write_gb_s < math.inf):
        raise ValueError("expected a utilization above 0, up to 1, and hours and GB/s above 0")
    return Assumptions(utilization=utilization, hours_between_failures=hours, write_bytes_s=1e9 * write_gb_s)
