"""The memory that a run needs: by hand, and as compiled; runs that cannot fit are refused, and no others."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import pytest

from model.config import from_variant
from model.imp import Imp
from model.step import OptimizerConfig, compile_step, state_shapes
from model.structure import InputShape, Structure
from pipeline import recipe as recipes
from pipeline.errors import RequestError
from pipeline.plan import plan
from pipeline.train import memory_fit
from pipeline.train.memory_fit import MemoryCheck, advice, out_of_memory
from pipeline.train.memory_need import Layout, Need, compiled_parts, estimated_parts, layout_here, peak_bytes
from pipeline.train.run import train
from tests.pipeline.train.bare_run import run

CONFIG = from_variant("imp-tiny-moe", dtype="float32", vocab_size=100)
PAIRS = Structure("nce", 64, (InputShape("vision", 16, 768, 3), InputShape("text", 8, 0, 1)))
CLASSES = Structure("softmax", 32, (PAIRS.inputs[0],), classifier="a", num_classes=5, classes=tuple(range(5)))
NEED = Need(CONFIG, (PAIRS,), Layout(1))


def analysis(*, arguments=0, output=0, alias=0, temp=0, peak=0, code=0):
    return types.SimpleNamespace(
        argument_size_in_bytes=arguments,
        output_size_in_bytes=output,
        alias_size_in_bytes=alias,
        temp_size_in_bytes=temp,
        peak_memory_in_bytes=peak,
        generated_code_size_in_bytes=code,
    )


def test_the_state_of_a_device_by_layout():
    shapes = {
        "kernel": jax.ShapeDtypeStruct((8, 5), jnp.float32),
        "experts": {"up": jax.ShapeDtypeStruct((3, 4, 6, 7), jnp.float32)},
    }
    kernel, experts = 4 * 8 * 5, 4 * 3 * 4 * 6 * 7
    assert Layout(8).bytes_of(shapes) == kernel + experts
    assert Layout(8, expert_parallel=2).bytes_of(shapes) == kernel + experts // 2
    # Over the 4 devices along data: the 8 rows of the kernel, no axis of the experts (6 and 7).
    assert Layout(8, expert_parallel=2, fsdp=True).bytes_of(shapes) == kernel // 4 + experts // 2
    # CPU devices of one process share its memory.
    assert Layout(2, platform="cpu", sharing=2).bytes_of(shapes) == 2 * (kernel + experts)
    assert Layout(8, sharing=2).part_of(100) == 26


def test_the_peak_of_a_compiled_step():
    found = analysis(arguments=100, output=60, alias=50, temp=30, peak=120)
    assert peak_bytes(found, Layout(4, platform="tpu")) == 120
    assert peak_bytes(found, Layout(4, platform="gpu")) == 140
    assert peak_bytes(found, Layout(4, platform="cpu", sharing=4)) == 560


@pytest.mark.slow
def test_parts_of_a_compiled_step_are_those_of_arithmetic():
    config = dataclasses.replace(CONFIG, depth=1, moe=None)
    imp = Imp.for_structures(config, [CLASSES])
    step = compile_step(imp, CLASSES, OptimizerConfig(peak_learning_rate=1e-3, warmup_steps=1, num_steps=10))
    found, layout = step.executable.memory_analysis(), dataclasses.replace(layout_here(), num_devices=1, sharing=1)
    parts = compiled_parts(found, config, CLASSES, layout)
    assert sum(parts.values()) == peak_bytes(found, layout) + found.generated_code_size_in_bytes
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state_shapes(imp)))
    params = sum(4 * x.size for x in jax.tree.leaves(imp.shapes()))
    # The learning rate is an argument too.
    assert parts["state"] == pytest.approx(state, abs=64) and parts["gradients"] == params
    estimated = estimated_parts(config, CLASSES, layout)
    assert estimated["state"] == state and estimated["batch"] == parts["batch"]
    assert 0.5 < estimated["activations"] / parts["activations"] < 2


def test_parts_add_up_to_the_peak_and_the_program():
    estimated = estimated_parts(CONFIG, PAIRS, Layout(1))
    arguments = estimated["state"] + estimated["batch"] + 4
    found = analysis(arguments=arguments, temp=estimated["gradients"] + 1000, code=70)
    parts = compiled_parts(found, CONFIG, PAIRS, Layout(1))
    own = {"state": estimated["state"] + 4, "activations": 1000, "program": 70}
    assert parts == estimated | own
    # A peak below that of arguments and gradients: some gradients are never all there.
    parts = compiled_parts(analysis(arguments=arguments, temp=500), CONFIG, PAIRS, Layout(1))
    assert (parts["gradients"], parts["activations"]) == (500, 0)


def test_what_cannot_fit_is_refused_and_nothing_else():
    state = NEED.state()
    MemoryCheck(NEED, limit=state, where="a device").check_state()
    MemoryCheck(NEED, limit=None, where="a device").check_state()
    with pytest.raises(RequestError, match=r"parameters and moments take .* a device has .*: .*would make it fit"):
        MemoryCheck(NEED, limit=state - 1, where="a device").check_state()
    batch = estimated_parts(CONFIG, PAIRS, NEED.layout)["batch"]
    # Arguments are state and batch, which are counted for all groups.
    found = analysis(arguments=1000, temp=5000)
    for limit in (None, state + batch + 5000):
        check = MemoryCheck(NEED, limit=limit, where="a device")
        check.check_step(PAIRS, found)
        assert check.needed == state + batch + 5000
    check.check_step(PAIRS, None)
    with pytest.raises(RequestError, match=r"the state and a compiled step take .*: .*would make it fit"):
        MemoryCheck(NEED, limit=state + batch + 4999, where="a device").check_step(PAIRS, found)


def test_a_compilers_refusal_is_told_from_other_errors():
    error = RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory. Used 32.50G of 30.75G hbm. Exceeded by 1.75G.")
    words, size = out_of_memory(error)
    assert words == "needs 32.50 GiB of 30.75 GiB" and size == int(32.5 * 2**30)
    assert out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: out of memory"))[1] is None
    assert out_of_memory(RuntimeError("INVALID_ARGUMENT")) is None
    with pytest.raises(RequestError, match=r"than a device has: needs 32\.50 GiB"):
        MemoryCheck(NEED, limit=1 << 30, where="a device").check_refusal(PAIRS, error)
    for other in ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED: out of memory while trying kernels"):
        MemoryCheck(NEED, limit=1 << 30, where="a device").check_refusal(PAIRS, RuntimeError(other))


def room_for(need: Need) -> int:
    """The least memory that advice takes as enough."""
    return int(need.total() / (1 - memory_fit.MARGIN)) + 2


def test_one_setting_is_named_if_it_makes_the_run_fit():
    keeping = dataclasses.replace(NEED, config=dataclasses.replace(CONFIG, remat="none"))
    full = dataclasses.replace(NEED, config=dataclasses.replace(CONFIG, remat="full"))
    assert advice(keeping, room_for(full)).startswith("model.remat: full would make it fit")
    four = dataclasses.replace(full, layout=Layout(4))
    spread = dataclasses.replace(four, layout=Layout(4, fsdp=True))
    assert advice(four, room_for(spread)).startswith("cluster.fsdp: true would")
    experts = dataclasses.replace(full, layout=Layout(4, expert_parallel=4))
    assert experts.total() > spread.total()
    only_experts = dataclasses.replace(spread, layout=Layout(4, 4, fsdp=True))
    assert advice(spread, room_for(only_experts)).startswith("cluster.expert_parallel: 4 would")


def test_settings_are_added_up_if_one_alone_does_not_do():
    four = dataclasses.replace(NEED, config=dataclasses.replace(CONFIG, remat="none"), layout=Layout(4))
    both = dataclasses.replace(
        four, config=dataclasses.replace(CONFIG, remat="full"), layout=dataclasses.replace(four.layout, fsdp=True)
    )
    found = advice(four, room_for(both))
    assert found.startswith("model.remat: full, cluster.fsdp: true together would make it fit")
    # With all four devices along the expert axis nothing else would be shared: that is left out.
    found = advice(four, room_for(dataclasses.replace(both, samples=0.5)))
    assert re.match(r"model.remat: full, cluster.fsdp: true, batches of 32 samples .* or \d+ devices would", found)
    assert advice(four, 1000).endswith("use a smaller model.variant")
    alone = dataclasses.replace(NEED, config=dataclasses.replace(CONFIG, remat="full"))
    eight = dataclasses.replace(alone, layout=Layout(8, fsdp=True))
    assert advice(alone, room_for(eight)) == "8 devices with cluster.fsdp: true would make it fit"


def test_the_state_counts_groups_of_other_steps_too():
    with_others = dataclasses.replace(NEED, others=(CLASSES,))
    # Weights and biases of 5 classes, with both moments, and the group's count.
    assert with_others.state() - NEED.state() == 3 * 4 * (CONFIG.width + 1) * 5 + 4
    larger = Need(CONFIG, (PAIRS, CLASSES), Layout(1))
    assert larger.total() >= NEED.total()


@pytest.fixture
def spec(toy_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.train.rank.measured_flops_per_s", lambda config: 1e9)
    return plan(recipes.from_dict(toy_recipe), tmp_path)


def test_a_run_whose_state_cannot_fit_is_refused_before_anything_starts(spec, monkeypatch):
    monkeypatch.setattr("pipeline.train.devices.memory_limit", lambda: (1 << 20, "this machine"))
    monkeypatch.setattr("pipeline.train.devices.swap_bytes", lambda: 0)
    with pytest.raises(RequestError, match=r"parameters and moments take .* this machine has 1 MiB"):
        train(spec, lambda schedule: pytest.fail("queues were opened"))


def test_a_run_whose_compiled_step_cannot_fit_is_refused(spec, toy_recipe, tmp_path, monkeypatch):
    step = types.SimpleNamespace(executable=types.SimpleNamespace(memory_analysis=lambda: analysis(temp=1 << 50)))
    monkeypatch.setattr("pipeline.train.rank.compile_step", lambda *_, **__: step)
    with pytest.raises(RequestError, match=r"a compiled step take 1048576 GiB of memory, this machine has"):
        run(recipes.from_dict(toy_recipe), tmp_path)


def test_what_the_compiler_refuses_is_refused(spec, toy_recipe, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 32.50G of 30.75G hbm")

    monkeypatch.setattr("pipeline.train.rank.compile_step", refuse)
    with pytest.raises(RequestError, match=r"than this machine has: needs 32\.50 GiB of 30\.75 GiB"):
        run(recipes.from_dict(toy_recipe), tmp_path)
