"""Plans of runs: sums over steps, memory, price, and what is said of machines that cannot be."""

import dataclasses
import json
import math

import pytest

from pipeline import recipe as recipes
from pipeline.errors import RequestError
from pipeline.planning import hardware
from pipeline.planning.job import plan_run
from pipeline.planning.run_plan import Assumptions, chosen, run_plan, run_schedule, setting_of
from pipeline.planning.structures import StepPlan, step_plan
from tests.pipeline.recipe.base import BASE, changed

GIB = 1 << 30


def plan_of(structure, *, step_s=2.0, peak=GIB, problem=None) -> StepPlan:
    memory = {"peak": peak, "state": 0, "batch": 0, "program": 0}
    return StepPlan("compiler", memory, step_s, 0.0, 1e12, 1.2e12, 0.0, {}, {}, False, 0.0, problem)


@pytest.fixture
def run():
    recipe = recipes.from_dict(BASE)
    setting = setting_of(recipe, hardware.gpus("h200:1"))
    return recipe, setting, run_schedule(recipe)


def test_time_and_price_are_sums_over_the_steps(run):
    recipe, setting, schedule = run
    plans = {structure: plan_of(structure) for structure in schedule.structures.values()}
    found = run_plan(setting, schedule, plans, Assumptions())
    assert found.days == pytest.approx(recipe.train.num_steps * 2.0 / 86400)
    assert found.price == pytest.approx(24 * found.days * 7.91)
    assert found.traced_over_analytic == pytest.approx(1.2) and found.fits


def test_steps_without_a_plan_take_the_time_of_their_flops(run):
    _, setting, schedule = run
    structures = list(dict.fromkeys(schedule.structures.values()))
    every = {s: step_plan(setting, s, utilization=0.4, cache=None) for s in structures}
    whole = run_plan(setting, schedule, every, Assumptions())
    part = run_plan(setting, schedule, {structures[0]: every[structures[0]]}, Assumptions())
    # All at one rate of FLOPs, so that the parts add up alike.
    assert part.days == pytest.approx(whole.days, rel=1e-6)
    assert whole.utilization == pytest.approx(0.4, rel=1e-6)


def test_saves_are_as_far_apart_as_youngs_rule_has_it(run):
    _, setting, schedule = run
    plans = {structure: plan_of(structure) for structure in schedule.structures.values()}
    found = run_plan(setting, schedule, plans, Assumptions(hours_between_failures=10, write_bytes_s=1e6, restart_s=60))
    save_s = found.checkpoint_bytes / 1e6
    every = math.sqrt(2 * save_s * 36000)
    assert found.save_s == pytest.approx(save_s) and found.save_every_s == pytest.approx(every)
    assert found.goodput == pytest.approx(1 - save_s / every - (every / 2 + 60) / 36000)


@pytest.mark.parametrize("share, fits", [(0.85, True), (0.95, False), (1.2, False)])
def test_a_tenth_of_the_memory_stays_free(run, share, fits):
    _, setting, schedule = run
    peak = int(share * setting.machine.device.memory_bytes)
    plans = {structure: plan_of(structure, peak=peak) for structure in schedule.structures.values()}
    found = run_plan(setting, schedule, plans, Assumptions())
    assert found.fits is fits and (found.advice is None) is fits


def test_one_structure_of_each_modality_is_chosen(run):
    _, setting, schedule = run
    found = chosen(schedule, setting, every=False)
    modalities = {i.modality for s in schedule.structures.values() for i in s.inputs}
    assert {i.modality for s in found for i in s.inputs} == modalities and len(found) <= len(modalities)
    assert chosen(schedule, setting, every=True) == list(dict.fromkeys(schedule.structures.values()))


def test_sizes_of_data_that_are_not_here():
    raw = changed(("data_sets.films.plan", {"rows": 1000, "classes": 700}))
    schedule = run_schedule(recipes.from_dict(raw))
    assert schedule.num_rows["films"] == 1000


def test_a_plan_is_kept_and_read_again(run, tmp_path, monkeypatch):
    _, setting, schedule = run
    structure = next(iter(schedule.structures.values()))
    first = step_plan(setting, structure, utilization=0.4, cache=tmp_path)
    (kept,) = tmp_path.glob("*.json")
    monkeypatch.setattr("pipeline.planning.structures._plan", lambda *_: pytest.fail("planned again"))
    assert step_plan(setting, structure, utilization=0.4, cache=tmp_path) == first
    kept.write_text("{")
    with pytest.raises(pytest.fail.Exception):
        step_plan(setting, structure, utilization=0.4, cache=tmp_path)


def test_another_price_needs_no_other_plan(run, tmp_path, monkeypatch):
    """A plan of a TPU takes minutes to compile."""
    _, setting, schedule = run
    structure = next(iter(schedule.structures.values()))
    first = step_plan(setting, structure, utilization=0.4, cache=tmp_path)
    monkeypatch.setattr("pipeline.planning.structures._plan", lambda *_: pytest.fail("planned again"))
    cheaper = dataclasses.replace(setting.machine, device=dataclasses.replace(setting.machine.device, price=0.01))
    setting = dataclasses.replace(setting, machine=cheaper)
    assert step_plan(setting, structure, utilization=0.4, cache=tmp_path) == first
    # Without a compiler the utilization decides the time.
    with pytest.raises(pytest.fail.Exception):
        step_plan(setting, structure, utilization=0.5, cache=tmp_path)


def test_a_run_is_planned_without_its_data(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("IMP_CACHE", str(tmp_path))
    recipe = recipes.from_dict(BASE)
    assert plan_run(recipe, hardware.gpus("h200:1"), Assumptions(), as_lines=False) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["device"]["name"] == "h200" and found["price"] > 0
    small = dataclasses.replace(hardware.gpus("h200:1").device, memory_bytes=1 << 20)
    assert plan_run(recipe, hardware.Machine(small, 1), Assumptions()) == 1
    assert "DOES NOT FIT: model.remat: full" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["v4", "v4:", "v9:4x4", "v4:4", "h200:4x4", "v4:0x"])
def test_unknown_topologies_are_refused(text):
    with pytest.raises(RequestError, match="v4:4x8x8"):
        hardware.tpu(text)


@pytest.mark.parametrize("text", ["h200", "h200:0", "v4:8", "h200:-1", "b:8"])
def test_unknown_gpus_are_refused(text):
    with pytest.raises(RequestError, match="h200:8"):
        hardware.gpus(text)


def test_the_shape_of_a_topology():
    machine = hardware.tpu("v4:4x8x8")
    assert (machine.num_devices, machine.topology, machine.platform, machine.name) == (
        256,
        (4, 8, 8),
        "tpu",
        "v4:4x8x8",
    )
    assert machine.device.peak_flops == 275e12


def test_prices_of_ones_own(tmp_path):
    path = tmp_path / "prices.yaml"
    path.write_text("h200: 3.5\n")
    assert hardware.with_prices(hardware.gpus("h200:8"), path).device.price == 3.5
    assert hardware.with_prices(hardware.gpus("a100:8"), path).device.price == hardware.DEVICES["a100"].price
    for text in ("h200: cheap\n", "- 1\n", "h200: -1\n", "h200: [", "h200: .inf\n"):
        path.write_text(text)
        with pytest.raises(RequestError, match="--prices"):
            hardware.with_prices(hardware.gpus("h200:8"), path)
    with pytest.raises(RequestError, match="--prices: cannot read"):
        hardware.with_prices(hardware.gpus("h200:8"), tmp_path / "none.yaml")


def test_a_batch_that_the_devices_cannot_share():
    recipe = recipes.from_dict(BASE)
    with pytest.raises(RequestError, match="cannot be shared by 7 devices"):
        plan_run(recipe, hardware.gpus("h200:7"), Assumptions())
