"""Plans of runs: sums over steps, memory, price, and what is said of machines that cannot be."""

import dataclasses
import json
import math
import types

import jax
import pytest

from model.imp import Imp
from pipeline import recipe as recipes
from pipeline.errors import RequestError
from pipeline.planning import hardware
from pipeline.planning.job import plan_run
from pipeline.planning.run_plan import (
    Assumptions,
    _decode_s,
    chosen,
    goodput,
    run_plan,
    run_schedule,
    save_interval_s,
    setting_of,
)
from pipeline.planning.structures import StepPlan, _gathered_tokens, step_plan
from tests.pipeline.recipe.base import BASE, changed

GIB = 1 << 30


def plan_of(structure, *, step_s=2.0, peak=GIB, problem=None) -> StepPlan:
    memory = {"peak": peak, "state": 0, "gradients": 0, "activations": peak, "batch": 0, "program": 0}
    return StepPlan("compiler", memory, step_s, 0.0, 1e12, 1.2e12, 0.0, {}, {}, 0.0, 0.0, problem)


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


def test_the_interval_of_saves_and_goodput_by_hand():
    """A save of 50 s at a failure every 10,000 s: every 1,000 s, 5 % for saves, 500 + 100 s lost a failure."""
    assert save_interval_s(50, 10_000) == pytest.approx(1000)
    assert goodput(50, 1000, restart_s=100, between_s=10_000) == pytest.approx(1 - 0.05 - 0.06)
    assert goodput(50, 1000, restart_s=1e6, between_s=10_000) == 0


def test_decoding_input_and_checkpoints_by_hand(run):
    """Steps of 2 s; a photograph takes 5 ms of a CPU, a film 110, ten seconds of sound 30."""
    recipe, setting, schedule = run
    plans = {structure: plan_of(structure) for structure in schedule.structures.values()}
    found = run_plan(setting, schedule, plans, Assumptions())
    cpu_s = sum(
        step.share
        * step.structure.global_batch_size
        * sum({"image": 0.005, "video": 0.11, "audio": 0.03}.get(m, 0) for m in recipe.tasks[step.task].modalities)
        for step in found.steps
    )
    assert found.decode_cpus == pytest.approx(cpu_s / 2.0)
    arrays = {step.structure: jax.tree.leaves(step.structure.batch_shapes()) for step in found.steps}
    sizes = {structure: sum(x.size * x.dtype.itemsize for x in leaves) for structure, leaves in arrays.items()}
    assert found.input_bytes_s > 0 and max(sizes.values()) / 2.0 >= found.input_bytes_s >= min(sizes.values()) / 2.0
    imp = Imp.for_structures(setting.config, schedule.model_structures)
    # Parameters and both moments in float32, and a count of 4 bytes for each group.
    assert found.checkpoint_bytes == 12 * sum(x.size for x in jax.tree.leaves(imp.shapes())) + 4 * len(imp.groups)
    # Three batches, the state of all groups, and the largest step.
    assert found.memory["batch"] == 3 * max(sizes.values()) and found.memory["state"] == found.checkpoint_bytes
    assert found.peak_bytes == sum(found.memory.values())


def test_films_are_known_by_their_modality(run):
    """A photograph in patches of any size takes as long to decode as any other."""
    _, _, schedule = run
    structure = next(iter(schedule.structures.values()))
    photos = types.SimpleNamespace(modalities=("image", "text"))
    films = types.SimpleNamespace(modalities=("video", "audio"))
    assert _decode_s(photos, structure) == pytest.approx(0.005 * structure.global_batch_size)
    assert _decode_s(films, structure) == pytest.approx(0.14 * structure.global_batch_size)


def test_what_is_gathered_is_told_apart(run):
    """Parameters, whole or a layer's, and a row a sample are no tokens."""
    _, setting, schedule = run
    structure = next(iter(schedule.structures.values()))
    imp = Imp.for_structures(setting.config, [structure])
    stack = max(jax.tree.leaves(imp.shapes()), key=lambda x: x.ndim)
    batch, width = structure.global_batch_size, setting.config.width
    harmless = {stack.size: 1.0, stack.size // stack.shape[0]: 1.0, batch * width: 1.0}
    assert _gathered_tokens(harmless, structure, setting) == 0
    tokens = batch * width * structure.inputs[0].num_tokens
    assert _gathered_tokens(harmless | {tokens: 7.0}, structure, setting) == 7


def test_hosts_are_of_the_table():
    assert hardware.gpus("h200:16").num_hosts == 2 and hardware.gpus("h200:1").num_hosts == 1
    assert hardware.tpu("v4:4x8x8").num_hosts == 64


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
    assert "DOES NOT FIT: no batch and no number of devices" in capsys.readouterr().out


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


@pytest.mark.slow
def test_a_plan_here_is_compared_with_its_steps(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("IMP_CACHE", str(tmp_path))
    task = BASE["tasks"]["photo_classes"] | {"batch_size": 16, "variants": [{"size": 64}]}
    raw = BASE | {"model": {"variant": "imp-tiny"}, "tasks": {"photo_classes": task}}
    recipe = recipes.from_dict(raw)
    assert plan_run(recipe, hardware.here(), Assumptions(), measure=True, as_lines=False) == 0
    found = json.loads(capsys.readouterr().out)
    (measured,) = found["measured"]
    plans = [step["plan"] for step in found["steps"] if step["plan"]]
    assert measured["step_s"] > 0 and plans[0]["step_s"] > 0 and plans[0]["source"] == "compiler"
    if measured["memory_bytes"] is not None:
        # A few MiB are the libraries' own.
        planned = plans[0]["memory"]["peak"] - plans[0]["memory"]["program"]
        assert measured["memory_bytes"] == pytest.approx(planned, rel=0.2, abs=8 << 20)
