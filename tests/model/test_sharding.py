"""The same training on one device and on eight, in processes of their own with eight CPU devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from model.config import MoEConfig
from model.imp import Imp
from model.sharding import check_batch, make_mesh, state_shardings
from model.structure import Structure

SCRIPT = r"""
import json
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from model import tpu_attention
from model.config import ModelConfig, MoEConfig, OptimizerConfig
from model.imp import Imp
from model.structure import InputShape, Structure
from model.sharding import make_mesh, path_keys, over_batch, put_batch, put_state, replicated, state_shardings
from model.step import compile_step, init_state, learning_rates

BATCH, VISION, TEXT = 16, InputShape("vision", 6, 12, 3), InputShape("text", 5, 0, 1)
SIZES = dict(
    width=16, num_heads=2, head_dim=8, depth=2, mlp_dim=32, common_dim=12, vocab_size=40, vision_patch=(4, 2, 2),
    vision_positions=(4, 4, 4), text_positions=(32,), qk_norm=True,
)
PAIRS = Structure("nce", BATCH, (VISION, TEXT))
CLASSES = dict(classifier="digits", num_classes=3, classes=(0, 1, 2))
MOE = dict(num_experts=4, num_layers=1)
# (model settings, structure, {name: (devices along the expert axis, FSDP)})
CASES = [
    ({"moe": MoEConfig(**MOE)}, PAIRS, {"experts": (4, False), "experts and fsdp": (2, True)}),
    (
        {
            "moe": MoEConfig(
                **MOE, router="tokens_choose", num_selected=2, dispatch="einsum", load_balance_weight=0.1,
                placement="interleaved", group="tokens", group_size=12,
            ),
            "towers": "per_modality",
            "contrastive_chunk": 5,
            "heads": "per_modality",
            "matryoshka": (4, 12),
        },
        Structure((("nce", 1.0), ("softmax", 0.5)), BATCH, (VISION, TEXT), **CLASSES),
        {"everything else": (2, False)},
    ),
    (
        {"moe": MoEConfig(**MOE)},
        Structure("softmax", BATCH, (VISION,), microbatches=2, **CLASSES),
        {"microbatches": (4, False)},
    ),
]


def batch_of(structure):
    rng = np.random.default_rng(0)
    batch = {
        "vision": {
            "tokens": rng.integers(0, 256, (BATCH, 6, 12)).astype(np.uint8),
            "positions": rng.integers(0, 4, (BATCH, 6, 3)).astype(np.int32),
        },
        "text": {
            "tokens": rng.integers(0, 40, (BATCH, 5)).astype(np.int32),
            "positions": np.tile(np.arange(5, dtype=np.int32)[None, :, None], (BATCH, 1, 1)),
            "mask": np.arange(5) < rng.integers(1, 6, (BATCH, 1)),
        },
        "positive_ids": np.array([[n % 2, n // 2] for n in (0, *range(BATCH - 1))], np.int32),
        "labels": np.eye(3, dtype=np.uint8)[np.arange(BATCH) % 3],
    }
    return {name: batch[name] for name in structure.batch_shapes()}


def arrays_of(text, operation):
    # Shapes of what the operation gives, also where it gives several.
    results = re.findall(r"= (.*?) " + operation + r"(?:-start)?\(", text)
    shapes = [dims for result in results for dims in re.findall(r"\w+\[([\d,]*)\]", result)]
    return [[int(n) for n in dims.split(",") if n] for dims in shapes]


def train(settings, structure, mesh, fsdp):
    imp = Imp.for_structures(ModelConfig(**SIZES, **settings), [structure])
    optimizer = OptimizerConfig(1e-2, warmup_steps=0, num_steps=100)
    step = compile_step(imp, structure, optimizer, mesh=mesh, fsdp=fsdp)
    state = init_state(imp.init(0))
    state = put_state(state, state_shardings(state, mesh, fsdp=fsdp))
    arrays, losses, rates = put_batch(batch_of(structure), mesh), [], learning_rates(optimizer)
    for at in range(2):
        metrics = step(state, arrays, put_state(rates[at], replicated(mesh)))
        losses.append(float(metrics["loss"]))
        if at == 0:
            # One update from zero: the first moment is a tenth of the clipped gradient.
            gradients = jax.tree.map(np.asarray, {name: group["mu"] for name, group in state.items()})
    text, rows = step.executable.as_text(), arrays["vision"]["tokens"].addressable_shards
    return {
        "losses": losses,
        "gradients": [leaf.ravel().tolist() for leaf in jax.tree.leaves(gradients)],
        "statistics": jax.tree.map(lambda x: np.asarray(x).tolist(), metrics["moe"]),
        "first_rows": sorted(shard.index[0].start or 0 for shard in rows),
        "shards": {
            "/".join(str(k.key) for k in path): [list(p.shape), list(p.addressable_shards[0].data.shape)]
            for path, p in jax.tree.leaves_with_path(state)
        },
        "collectives": {o: arrays_of(text, o) for o in ("all-gather", "all-reduce", "all-to-all", "reduce-scatter")},
    }


def in_bfloat16(mesh, fsdp):
    # Gradients, and the types in which the partitioner sums them: CPUs widen bfloat16 later. Without excess precision,
    # or rounding would depend on what is fused.
    imp = Imp.for_structures(ModelConfig(**SIZES, dtype="bfloat16", moe=MoEConfig(**MOE)), [PAIRS])
    where = state_shardings(imp.shapes(), mesh, fsdp=fsdp)
    gradients = jax.grad(lambda params, batch: imp.loss(params, batch, PAIRS)[0])
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        lowered = jax.jit(gradients, in_shardings=(where, over_batch(mesh)), out_shardings=where).lower(
            imp.shapes(), PAIRS.batch_shapes()
        )
        options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd.*", "xla_allow_excess_precision": False}
        step = lowered.compile(compiler_options=options)
        text = "".join(path.read_text() for path in Path(folder).glob("*.after_spmd-partitioning.*"))
    values = step(put_state(imp.init(0), where), put_batch(batch_of(PAIRS), mesh))
    return {
        "gradients": {"/".join(path_keys(p)): np.asarray(g).tolist() for p, g in jax.tree.leaves_with_path(values)},
        "reduced": re.findall(r"= (\w+)\[[\d,]*\]\S* (?:all-reduce|reduce-scatter)\(", text),
    }


def kernel(mesh):
    # Gradients of the inputs, which each device has its own of, and of the scales, which all have.
    qkv = jax.random.normal(jax.random.key(0), (BATCH, 3, 32, 128))
    scales = (jnp.linspace(0.5, 1.5, 16), jnp.linspace(1.5, 0.5, 16))

    def loss(qkv, scales):
        mask = jnp.arange(128) < 100 + jnp.arange(BATCH)[:, None]
        return (tpu_attention.attend(qkv, mask, scales, num_heads=2) ** 3).sum()

    with jax.set_mesh(mesh):
        shards = (over_batch(mesh), replicated(mesh))
        return jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)), in_shardings=shards)(qkv, scales))


devices, found = jax.devices(), {}
one, eight = kernel(make_mesh(devices[:1])), kernel(make_mesh(devices, expert=2))
found["kernel"] = [float(jnp.abs(a - np.asarray(b)).max() / jnp.abs(a).max()) for a, b in zip(one, eight)]
for settings, structure, meshes in CASES:
    one = train(settings, structure, make_mesh(devices[:1]), False)
    for name, (expert, fsdp) in meshes.items():
        found[name] = {"one": one, "eight": train(settings, structure, make_mesh(devices, expert=expert), fsdp)}
found["bfloat16"] = {
    "one": in_bfloat16(make_mesh(devices[:1]), False), "eight": in_bfloat16(make_mesh(devices, expert=2), True)
}
print(json.dumps(found))
"""

CASES = ("experts", "experts and fsdp", "everything else", "microbatches")


@pytest.fixture(scope="module")
def runs() -> dict:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-W", "error::UserWarning", "-c", SCRIPT]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=290, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_eight_devices_train_as_one_does(runs, case):
    one, eight = runs[case]["one"], runs[case]["eight"]
    assert one["losses"][0] != one["losses"][1]
    np.testing.assert_allclose(eight["losses"], one["losses"], atol=2e-5)
    for found, expected in zip(eight["gradients"], one["gradients"], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    for modality, statistics in one["statistics"].items():
        for name, value in statistics.items():
            if not (case == "microbatches" and name == "load_balance"):
                np.testing.assert_allclose(eight["statistics"][modality][name], value, atol=1e-4, err_msg=name)
    assert one["first_rows"] == [0]
    assert eight["first_rows"] == list(range(0, 16, 2))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_no_tokens_are_gathered(runs, case):
    """Weights are where they are sharded; besides, pooled features, ids and rows of logits: batch x width numbers."""
    eight = runs[case]["eight"]
    parameters = {tuple(shape) for shape, _ in eight["shards"].values()}
    parameters |= {(1, *shape[1:]) for shape in parameters}  # one layer of a stack
    parameters |= {(1, shape[1] // 2, *shape[2:]) for shape in parameters if len(shape) == 4}  # experts of a device
    for shape in eight["collectives"]["all-gather"]:
        is_parameter = tuple(sorted(shape)) in {tuple(sorted(p)) for p in parameters}
        assert is_parameter or np.prod(shape) <= 16 * 16, shape


@pytest.mark.slow
def test_expert_slots_go_to_their_experts_and_back(runs):
    """Of each modality's slots, forward and backward: 4 experts x 2 samples x 1 or 2 slots of 16 numbers a device."""
    shapes = runs["experts"]["eight"]["collectives"]["all-to-all"]
    assert shapes
    assert runs["experts"]["one"]["collectives"]["all-to-all"] == []
    slots = {np.prod(s) for s in shapes}
    assert slots <= {2 * 16 * n for n in (1, 2, 4, 8)}, shapes


@pytest.mark.slow
def test_each_device_runs_the_attention_kernel_for_its_own_samples(runs):
    assert len(runs["kernel"]) == 3
    assert max(runs["kernel"]) < 1e-5


@pytest.mark.slow
def test_bfloat16_gradients_are_summed_in_float32(runs):
    """Over two devices along the expert axis and four along the other, under FSDP; rounded anywhere to bfloat16 they
    would differ by 2e-3."""
    one, eight = runs["bfloat16"]["one"], runs["bfloat16"]["eight"]
    assert set(eight["reduced"]) == {"f32"} and len(eight["reduced"]) > len(one["gradients"])
    assert one["reduced"] == []
    for name, expected in one["gradients"].items():
        error = np.linalg.norm(np.subtract(eight["gradients"][name], expected))
        assert error <= 1e-5 * np.linalg.norm(expected), name


@pytest.mark.slow
def test_where_parameters_lie(runs):
    def shard(case: str, path: str):
        return runs[case]["eight"]["shards"][path]

    kernel, wi = "encoder/params/dense/mlp/wi/kernel", "encoder/mu/sparse/mlp/experts/wi"
    experts = {path for path, (whole, part) in runs["experts"]["eight"]["shards"].items() if whole != part}
    assert len(experts) == 6 and all("/experts/" in path for path in experts)  # two matrices, two moments
    assert shard("experts", wi) == [[1, 4, 16, 32], [1, 1, 16, 32]]
    # FSDP over 4 devices: the longest axis that 4 divides, never that of the layers; a scalar on every device.
    fsdp = "experts and fsdp"
    assert shard(fsdp, kernel) == [[1, 16, 32], [1, 16, 8]]
    assert shard(fsdp, kernel.replace("params", "nu")) == [[1, 16, 32], [1, 16, 8]]
    assert shard(fsdp, "embed_text/params/table") == [[40, 16], [10, 16]]
    assert shard(fsdp, "pair_text_vision/params/tau") == [[], []]
    assert shard(fsdp, wi) == [[1, 4, 16, 32], [1, 2, 16, 8]]


def test_mesh_of_one_device_has_the_axes_of_any_other():
    mesh = make_mesh(jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "expert": 1}


def test_devices_that_expert_groups_do_not_divide_raise():
    with pytest.raises(ValueError, match="1 devices cannot be split into 2 expert groups"):
        make_mesh(jax.devices()[:1], expert=2)


def mesh_of(data: int, expert: int):
    return jax.sharding.AbstractMesh((data, expert), ("data", "expert"))


def test_experts_that_devices_do_not_divide_raise(tiny, inputs):
    structure = Structure("nce", 8, (inputs("vision", 4), inputs("text", 5)))
    shapes = Imp.for_structures(tiny(moe=MoEConfig(3, 1)), [structure]).shapes()
    with pytest.raises(ValueError, match="3 experts cannot lie over 2 devices in equal parts"):
        state_shardings(shapes, mesh_of(2, 2))
    placed = state_shardings(shapes, mesh_of(2, 3))
    assert placed["encoder"]["sparse"]["mlp"]["experts"]["wi"].spec == PartitionSpec(None, "expert", None, None)


@pytest.mark.parametrize(
    ("size", "fields", "message"),
    [
        (12, {}, "a batch of 12 samples cannot be shared by 8 devices in equal parts"),
        (
            32,
            {},
            r"4 samples a device cannot be cut into vision routing groups of 8 samples; make the batch a multiple of "
            r"64 \(it is 32\), or lower moe.group_size",
        ),
        (
            8,
            {"objectives": "softmax", "classifier": "c", "num_classes": 2, "classes": (0,), "microbatches": 2},
            "a batch of 8 samples cannot be shared by 8 devices of 2 microbatches each in equal parts",
        ),
    ],
)
def test_batches_that_devices_cannot_share_raise(tiny, inputs, size, fields, message):
    """Groups of up to 32 tokens: eight samples of four, six of five."""
    modalities = (inputs("vision", 4),) if fields else (inputs("vision", 4), inputs("text", 5))
    structure = Structure(**({"objectives": "nce", "global_batch_size": size, "inputs": modalities} | fields))
    config = tiny(moe=MoEConfig(2, 1, group="tokens", group_size=32))
    with pytest.raises(ValueError, match=message):
        check_batch(structure, structure.group_samples(config), mesh_of(4, 2))


def test_a_batch_that_devices_can_share(tiny, inputs):
    structure = Structure("nce", 64, (inputs("vision", 4), inputs("text", 4)))
    groups = structure.group_samples(tiny(moe=MoEConfig(2, 1, group="tokens", group_size=32)))
    assert groups == {"vision": 8, "text": 8}
    check_batch(structure, groups, mesh_of(4, 2))
