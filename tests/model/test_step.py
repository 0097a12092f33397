"""One compiled step: Adam against float64 numpy, clipping, the schedule, non-finite losses, untouched groups."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import step as step_module
from model.config import MoEConfig, OptimizerConfig, from_variant
from model.imp import Imp
from model.step import compile_step, init_state, learning_rates, make_step, rate_schedule, state_shapes
from model.structure import InputShape, Structure

AUDIO, TEXT = InputShape("audio", 3, 4, 2), InputShape("text", 5, 0, 1)
SOUNDS = Structure("softmax", 6, (AUDIO,), classifier="sounds", num_classes=3, classes=(0, 1, 2))
TOPICS = Structure("softmax", 6, (TEXT,), classifier="topics", num_classes=2, classes=(0, 1))
PAIRS = Structure("nce", 6, (AUDIO, TEXT))
ADAM = OptimizerConfig(1e-2, warmup_steps=4, num_steps=64, end_learning_rate=1e-3, b1=0.8, b2=0.9, clip_norm=0.1)


@pytest.fixture(scope="module")
def imp(tiny) -> Imp:
    return Imp.for_structures(tiny(), [SOUNDS])


@pytest.fixture(scope="module")
def step(imp):
    return compile_step(imp, SOUNDS, ADAM)


@pytest.fixture(scope="module")
def gradients(imp, jit):
    return jit(jax.grad(lambda params, batch: imp.loss(params, batch, SOUNDS)[0]))


def rate(at: int) -> np.float32:
    """ADAM's learning rate at a step."""
    return learning_rates(ADAM)[at]


def on_host(tree):
    return jax.tree.map(np.array, tree)


def adam_by_numpy(state, grads, *, scale: float, learning_rate: float):
    """One update of one group in float64."""
    count = int(state["count"]) + 1
    new = {"mu": [], "nu": [], "params": []}
    leaves = (jax.tree.leaves(t) for t in (state["params"], state["mu"], state["nu"], grads))
    for param, mu, nu, grad in zip(*leaves, strict=True):
        param, mu, nu, grad = (np.asarray(x, np.float64) for x in (param, mu, nu, grad))
        mu = 0.8 * mu + 0.2 * scale * grad
        nu = 0.9 * nu + 0.1 * (scale * grad) ** 2
        update = mu / (1 - 0.8**count) / (np.sqrt(nu / (1 - 0.9**count)) + 1e-7)
        for name, value in (("mu", mu), ("nu", nu), ("params", param - learning_rate * update)):
            new[name].append(value)
    return new, count


def check_one_step(step, gradients, state, batch, *, at: int, learning_rate: float) -> dict:
    """Runs a step, compares the whole new state with numpy, and returns the metrics."""
    state = on_host(state)
    grads = on_host(gradients({name: group["params"] for name, group in state.items()}, batch))
    norm = np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in jax.tree.leaves(grads)))
    new = dict(state)
    metrics = step(new, batch, rate(at))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    np.testing.assert_allclose(metrics["learning_rate"], learning_rate, rtol=1e-5)
    assert metrics["finite"]
    for name, group in state.items():
        scale = min(1.0, 0.1 / norm)
        expected, count = adam_by_numpy(group, grads[name], scale=scale, learning_rate=learning_rate)
        assert new[name]["count"] == count
        for part, tolerance in (("mu", 1e-6), ("nu", 1e-7), ("params", 1e-2 * learning_rate)):
            for found, value in zip(jax.tree.leaves(new[name][part]), expected[part], strict=True):
                np.testing.assert_allclose(found, value, rtol=1e-3, atol=tolerance, err_msg=f"{name} {part}")
    return metrics


def test_a_step_is_adam_with_clipping(imp, step, gradients, batch):
    """The encoder has seen five updates of other tasks, the rest none; the run is at step 7."""
    state, rng = init_state(imp.init(0)), np.random.default_rng(1)
    encoder = state["encoder"]
    encoder["count"] = jnp.int32(5)
    encoder["mu"] = jax.tree.map(lambda p: 1e-2 * rng.normal(size=p.shape).astype(np.float32), encoder["mu"])
    encoder["nu"] = jax.tree.map(lambda p: 1e-4 * rng.uniform(size=p.shape).astype(np.float32), encoder["nu"])
    cosine = 1e-3 + 9e-3 * 0.5 * (1 + np.cos(np.pi * (7 - 4) / (64 - 4)))
    metrics = check_one_step(step, gradients, state, batch(SOUNDS), at=7, learning_rate=cosine)
    assert metrics["grad_norm"] > 0.2  # so that clipping at 0.1 did something


def test_patch_projections_can_step_less(imp, jit, batch):
    def changes(optimizer):
        state, arrays = init_state(imp.init(0)), batch(SOUNDS)
        new, _ = jit(make_step(imp, SOUNDS, optimizer))(state, arrays, rate(7))
        return {n: jax.tree.map(lambda a, b: np.asarray(a - b), new[n]["params"], state[n]["params"]) for n in state}

    whole, less = changes(ADAM), changes(dataclasses.replace(ADAM, patch_scale=0.25))
    patch = whole["embed_audio"].pop("patch")
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(patch))
    for found, full in zip(jax.tree.leaves(less["embed_audio"].pop("patch")), jax.tree.leaves(patch), strict=True):
        np.testing.assert_allclose(found, 0.25 * full, rtol=1e-3, atol=1e-6)
    for found, full in zip(jax.tree.leaves(less), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(found, full, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_weight_decay_is_of_matrices_alone(tiny, jit, batch):
    """In proportion to the learning rate, and to the parameter (AdamW); biases, scales and tables have none."""
    imp = Imp.for_structures(tiny(moe=MoEConfig(2, 1)), [SOUNDS])

    def step(optimizer):
        new, _ = jit(make_step(imp, SOUNDS, optimizer))(init_state(imp.init(0)), batch(SOUNDS), np.float32(0.01))
        return {name: group["params"] for name, group in new.items()}

    params, without, decayed = imp.init(0), step(ADAM), set()
    with_decay = step(dataclasses.replace(ADAM, weight_decay=0.5))
    for (path, found), kept, old in zip(
        jax.tree.leaves_with_path(with_decay), jax.tree.leaves(without), jax.tree.leaves(params), strict=True
    ):
        if np.array_equal(found, kept):
            continue
        decayed.add(path[-1].key)
        np.testing.assert_allclose(kept - found, 0.01 * 0.5 * np.asarray(old), atol=1e-6)
    assert decayed == {"kernel", "wi", "wo"}


@pytest.fixture(scope="module")
def trained(imp, step, batch):
    """The state after 40 steps on one batch, and the loss of each."""
    state, arrays, losses = init_state(imp.init(0)), batch(SOUNDS), []
    for at in range(40):
        metrics = step(state, arrays, rate(at))
        losses.append(float(metrics["loss"]))
    return on_host(state), losses


def test_the_loss_of_one_batch_falls(trained):
    _, losses = trained
    np.testing.assert_allclose(losses[0], np.log(3), atol=0.2)  # three classes, a classifier near zero
    assert losses[1] == losses[0]  # the learning rate of step 0 is 0
    assert losses[-1] < 0.1 * losses[0]


def test_a_small_gradient_is_not_clipped(step, gradients, trained, batch):
    state, _ = trained
    cosine = 1e-3 + 9e-3 * 0.5 * (1 + np.cos(np.pi * (40 - 4) / (64 - 4)))
    metrics = check_one_step(step, gradients, state, batch(SOUNDS), at=40, learning_rate=cosine)
    assert metrics["grad_norm"] < 0.1
    assert {int(group["count"]) for group in state.values()} == {40}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_leaves_the_state_as_it_was(step, trained, batch, bad):
    state, _ = trained
    arrays = batch(SOUNDS)
    arrays["audio"]["tokens"][2, 1, 0] = bad
    new = on_host(state)
    metrics = step(new, arrays, rate(40))
    assert not metrics["finite"]
    assert not np.isfinite(metrics["loss"])
    assert jax.tree.structure(new) == jax.tree.structure(state)
    for found, expected in zip(jax.tree.leaves(new), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_first_state(imp):
    state = init_state(imp.init(0))
    assert set(state) == {"encoder", "embed_audio", "classifier_sounds"}
    for group in state.values():
        assert group["count"] == 0
        assert group["count"].dtype == np.int32
        for part in ("mu", "nu"):
            assert jax.tree.structure(group[part]) == jax.tree.structure(group["params"])
            assert not any(np.any(leaf) for leaf in jax.tree.leaves(group[part]))
    shapes = jax.tree.map(lambda s: (s.shape, s.dtype), state_shapes(imp))
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)


def test_a_step_takes_and_returns_its_own_groups(imp, step, trained, batch):
    state = on_host(trained[0])
    num_leaves = {name: len(jax.tree.leaves(params)) for name, params in imp.shapes().items()}
    moments_and_counts, of_the_batch, learning_rate = sum(3 * num + 1 for num in num_leaves.values()), 3, 1
    found = len(jax.tree.leaves(step.executable.args_info))
    assert found == moments_and_counts + of_the_batch + learning_rate
    assert step.groups == SOUNDS.groups(imp.config) == ("encoder", "embed_audio", "classifier_sounds")
    topics = {"params": np.ones(3)}
    before = {name: state[name] for name in step.groups}
    state["classifier_topics"] = topics
    step(state, batch(SOUNDS), rate(0))
    assert state["classifier_topics"] is topics
    assert all(state[name] is not group for name, group in before.items())


def test_a_dense_update_moves_the_groups_of_other_tasks(tiny, trained, batch):
    """With a gradient of zero: moments decay, the momentum that is left still moves the parameters, counts rise."""
    everything = Imp.for_structures(tiny(), [SOUNDS, TOPICS])
    dense = dataclasses.replace(ADAM, dense_update=True)
    step = compile_step(everything, SOUNDS, dense)
    assert step.groups == everything.groups
    state, rng = on_host(init_state(everything.init(0))), np.random.default_rng(2)
    topics = state["classifier_topics"]
    topics["count"] = np.int32(3)
    topics["mu"] = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), topics["mu"])
    topics["nu"] = jax.tree.map(lambda p: rng.uniform(1, 2, size=p.shape).astype(np.float32), topics["nu"])
    zeros = jax.tree.map(np.zeros_like, topics["params"])
    expected, count = adam_by_numpy(topics, zeros, scale=1.0, learning_rate=1e-2)
    step(state, batch(SOUNDS), np.float32(1e-2))
    assert state["classifier_topics"]["count"] == count == 4
    for part in ("params", "mu", "nu"):
        for found, value in zip(jax.tree.leaves(state["classifier_topics"][part]), expected[part], strict=True):
            np.testing.assert_allclose(found, value, rtol=1e-5, err_msg=part)


def test_a_temperature_at_its_floor_can_rise_again(tiny, jit, batch):
    """Adam's first step is the learning rate, against the gradient's sign: below the floor it would stay for ever."""
    imp = Imp.for_structures(tiny(temperature_init=0.1, temperature_floor=0.1), [PAIRS])
    step, state, arrays = jit(make_step(imp, PAIRS, ADAM)), init_state(imp.init(0)), batch(PAIRS)
    pair = state["pair_audio_text"]
    pair["mu"]["tau"], pair["count"] = jnp.float32(1.0), jnp.int32(1)  # momentum that pulls it down
    fallen, _ = step(state, arrays, np.float32(1.0))
    assert fallen["pair_audio_text"]["params"]["tau"] == np.float32(0.1)
    pair = fallen["pair_audio_text"]
    pair["mu"]["tau"], pair["nu"]["tau"] = jnp.float32(-1.0), jnp.float32(1.0)
    risen, _ = step(fallen, arrays, np.float32(0.01))
    assert risen["pair_audio_text"]["params"]["tau"] > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("group", ["sample", "tokens"])
def test_microbatches_update_as_the_whole_batch_does(tiny, jit, batch, group):
    """Groups of two samples of three tokens in the second case: no group is cut. Statistics are means too."""
    config = tiny(moe=MoEConfig(2, 1, group=group, group_size=6))
    whole = dataclasses.replace(SOUNDS, global_batch_size=8)
    parts = dataclasses.replace(whole, microbatches=2)
    assert parts.group_samples(config) == whole.group_samples(config) == {"audio": 1 if group == "sample" else 2}
    imp, arrays, found = Imp.for_structures(config, [whole]), batch(whole), []
    for structure in (whole, parts):
        step = jit(make_step(imp, structure, ADAM))
        found.append(step(init_state(imp.init(0)), arrays, rate(7)))
    for _, metrics in found:
        metrics["moe"]["audio"].pop("load_balance")  # a product of means
    for a, b in zip(*(jax.tree.leaves(metrics) for _, metrics in found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(*(jax.tree.leaves([group["mu"] for group in new.values()]) for new, _ in found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_another_task_changes_no_graph(tiny, imp):
    def graph(imp: Imp) -> str:
        shapes = {name: state_shapes(imp)[name] for name in SOUNDS.groups(imp.config)}
        lowered = jax.jit(make_step(imp, SOUNDS, ADAM))
        return lowered.lower(shapes, SOUNDS.batch_shapes(), jax.ShapeDtypeStruct((), jnp.float32)).as_text()

    more = Imp.for_structures(tiny(), [PAIRS, TOPICS, SOUNDS])
    assert len(more.groups) == 6
    assert graph(more) == graph(imp)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (50, 5e-4),  # half of the warmup
        (100, 1e-3),
        (600, (1e-3 + 1e-5) / 2),  # half of the cosine
        (1100, 1e-5),
        (5000, 1e-5),
    ],
)
def test_learning_rate(step, expected):
    schedule = rate_schedule(OptimizerConfig(1e-3, warmup_steps=100, num_steps=1100, end_learning_rate=1e-5))
    np.testing.assert_allclose(schedule(step), expected, rtol=1e-4, atol=1e-9)


def test_learning_rate_with_a_pre_warmup():
    """The release's: in a line from one small rate to another, then warmup and cosine, which takes what is left."""
    optimizer = OptimizerConfig(
        1e-3,
        warmup_steps=10,
        num_steps=50,
        end_learning_rate=1e-6,
        initial_learning_rate=5e-6,
        pre_warmup_steps=4,
        pre_warmup_learning_rate=2e-5,
    )
    rates = learning_rates(optimizer)
    np.testing.assert_allclose(rates[:5], [2e-5, 1.625e-5, 1.25e-5, 8.75e-6, 5e-6], rtol=1e-5)
    np.testing.assert_allclose(rates[[9, 14]], [(5e-6 + 1e-3) / 2, 1e-3], rtol=1e-5)
    np.testing.assert_allclose(rates[[32, 49]], [(1e-3 + 1e-6) / 2, 2.9e-6], rtol=0.05)
    np.testing.assert_allclose(rate_schedule(optimizer)(50), 1e-6, rtol=1e-3)


def test_learning_rates_are_the_schedule_at_every_step():
    optimizer = OptimizerConfig(1e-3, warmup_steps=10, num_steps=50)
    expected = [1e-4 * t if t < 10 else 5e-4 * (1 + np.cos(np.pi * (t - 10) / 40)) for t in range(50)]
    rates = learning_rates(optimizer)
    assert rates.dtype == np.float32
    np.testing.assert_allclose(rates, expected, rtol=1e-4, atol=1e-9)


def test_another_schedule_is_the_same_graph(imp):
    def graph(optimizer):
        shapes, rate = state_shapes(imp), jax.ShapeDtypeStruct((), jnp.float32)
        return jax.jit(make_step(imp, SOUNDS, optimizer)).lower(shapes, SOUNDS.batch_shapes(), rate).as_text()

    assert graph(dataclasses.replace(ADAM, num_steps=999, peak_learning_rate=3.0, warmup_steps=9)) == graph(ADAM)


def test_learning_rate_without_warmup_starts_at_its_peak():
    schedule = rate_schedule(OptimizerConfig(1e-3, warmup_steps=0, num_steps=10))
    np.testing.assert_allclose([schedule(0), schedule(5), schedule(10)], [1e-3, 5e-4, 0.0], atol=1e-9)


def test_a_run_shorter_than_its_warmup_keeps_warming_up():
    schedule = rate_schedule(OptimizerConfig(1e-3, warmup_steps=100, num_steps=10))
    np.testing.assert_allclose(schedule(10), 1e-4, rtol=1e-5)


@pytest.fixture
def full_compile(monkeypatch):
    """Has steps compiled as users' are, not as tests' flags ask for."""
    options = {"xla_cpu_use_fusion_emitters": True} if "xla_cpu_use_fusion_emitters" in os.environ["XLA_FLAGS"] else {}
    # A step's own options come after the flags, unless it finds them there.
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setattr(step_module, "_CPU_OPTIONS", step_module._CPU_OPTIONS | options)


@pytest.mark.slow
def test_the_norm_is_the_same_every_time_and_right(batch, full_compile):
    """Steps that skip this pass every other test and still never repeat bit for bit."""
    config = from_variant("imp-tiny-moe", vocab_size=60)
    structure = Structure("nce", 8, (InputShape("vision", 4, 768, 3), InputShape("text", 6, 0, 1)))
    imp, arrays = Imp.for_structures(config, [structure]), batch(structure)
    state = init_state(imp.init(0))
    optimizer = OptimizerConfig(peak_learning_rate=1e-3, warmup_steps=1, num_steps=10)
    step = compile_step(imp, structure, optimizer)
    norms = set()
    for _ in range(25):
        # b1 = .9 and one update: the first moment is a tenth of the clipped gradient.
        new = {group: jax.tree.map(jnp.copy, state[group]) for group in step.groups}
        metrics = step(new, arrays, np.float32(1e-3))
        norms.add(float(metrics["grad_norm"]))
        moments = jax.tree.leaves({name: group["mu"] for name, group in new.items()})
        clipped = np.sqrt(sum((np.asarray(m, np.float64) ** 2).sum() for m in moments)) * 10
        assert clipped == pytest.approx(1.0, rel=1e-4)
    assert len(norms) == 1
    assert norms.pop() > 1.0
