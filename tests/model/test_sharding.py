"""The same training on one device and on four, in a process of its own with four CPU devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from model.sharding import make_mesh

SCRIPT = """
import json

import jax
import numpy as np

from model.config import ModelConfig, MoEConfig
from model.imp import Imp, Inputs, Structure
from model.sharding import make_mesh, put_batch, put_replicated, step_shardings
from model.step import OptimizerConfig, compile_step, init_state

config = ModelConfig(
    width=16, num_heads=2, head_dim=8, depth=1, mlp_dim=32, common_dim=12, vocab_size=40, vision_patch=(4, 2, 2),
    vision_positions=(4, 4, 4), text_positions=(32,), qk_norm=True, moe=MoEConfig(2, 1, group="sample"),
)
structure = Structure("nce", 8, (Inputs("vision", 6, 12, 3), Inputs("text", 5, 0, 1)))
imp = Imp.for_structures(config, [structure])
optimizer = OptimizerConfig(1e-2, warmup_steps=0, num_steps=100)
rng = np.random.default_rng(0)
batch = {
    "vision": {
        "tokens": rng.integers(0, 256, (8, 6, 12)).astype(np.uint8),
        "positions": rng.integers(0, 4, (8, 6, 3)).astype(np.int32),
    },
    "text": {
        "tokens": rng.integers(0, 40, (8, 5)).astype(np.int32),
        "positions": np.tile(np.arange(5, dtype=np.int32)[None, :, None], (8, 1, 1)),
        "mask": np.arange(5) < rng.integers(1, 6, (8, 1)),
    },
    "positive_ids": np.array([0, 1, 2, 3, 4, 5, 6, 0], np.int32),
}


def train(mesh):
    step = compile_step(imp, structure, optimizer, shardings=step_shardings(mesh))
    state = put_replicated(init_state(imp.init(0)), mesh)
    arrays, losses, rates = put_batch(batch, mesh), [], optimizer.learning_rates()
    for at in range(3):
        state, metrics = step(state, arrays, put_replicated(rates[at], mesh))
        losses.append(float(metrics["loss"]))
    tokens, kernel = arrays["vision"]["tokens"], state["encoder"]["params"]["sparse"]["mlp"]["router"]["kernel"]
    return {
        "losses": losses,
        "statistics": jax.tree.map(lambda x: np.asarray(x).tolist(), metrics["moe"]),
        "batch_rows": [shard.data.shape[0] for shard in tokens.addressable_shards],
        "first_rows": sorted(shard.index[0].start or 0 for shard in tokens.addressable_shards),
        "replicated": kernel.sharding.is_fully_replicated,
        "copies": len(kernel.addressable_shards),
        "input_devices": len(jax.tree.leaves(step.input_shardings)[-1].device_set),
    }


devices = jax.devices()
print(json.dumps({"one": train(make_mesh(devices[:1])), "four": train(make_mesh(devices, expert=2))}))
"""


@pytest.fixture(scope="module")
def runs() -> dict:
    flags = "--xla_force_host_platform_device_count=4 "  # and little optimisation: half the time to compile
    flags += "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-W", "error::UserWarning", "-c", SCRIPT]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_four_devices_train_as_one_does(runs):
    one, four = runs["one"], runs["four"]
    assert len(set(one["losses"])) == 3
    np.testing.assert_allclose(four["losses"], one["losses"], atol=1e-5)
    for modality, statistics in one["statistics"].items():
        for name, value in statistics.items():
            np.testing.assert_allclose(
                four["statistics"][modality][name], value, atol=1e-4, err_msg=f"{modality} {name}"
            )


def test_the_batch_is_sharded_and_the_state_is_not(runs):
    one, four = runs["one"], runs["four"]
    assert (one["batch_rows"], one["copies"]) == ([8], 1)
    assert four["batch_rows"] == [2, 2, 2, 2]
    assert four["first_rows"] == [0, 2, 4, 6]
    assert four["replicated"]
    assert four["copies"] == four["input_devices"] == 4


def test_mesh_of_one_device_has_the_axes_of_any_other():
    mesh = make_mesh(jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "expert": 1}


def test_devices_that_expert_groups_do_not_divide_raise():
    with pytest.raises(ValueError, match="1 devices cannot be split into 2 expert groups"):
        make_mesh(jax.devices()[:1], expert=2)
