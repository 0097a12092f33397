"""Checkpoints in a bucket: whole or not there, from processes that share no disk, on S3 and on Google's protocol."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.train.checkpoint import Checkpoints
from tests.object_server import free_address

ROOT = Path(__file__).resolve().parents[3]


def make_state(value=1.0):
    params = {"w": jnp.full((100, 50), value), "b": jnp.arange(3.0) + value}
    return {"encoder": {"params": params, "mu": params, "count": jnp.int32(value)}}


def abstract(state):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)


def save(checkpoints, *steps):
    for step in steps:
        checkpoints.save(step, state=make_state(step), data={"seen": step})
    checkpoints.wait()


def test_checkpoints_come_back_and_old_ones_go(server, run_dir, tmp_path):
    save(Checkpoints(run_dir, keep_last=2), 1, 2, 3)
    again = Checkpoints(run_dir)
    assert again.steps == [2, 3] and again.latest_step == 3 and again.choose() == (3, [])
    jax.tree.map(np.testing.assert_array_equal, again.state(abstract(make_state())), make_state(3))
    assert {name.split("/")[1] for name in server.files()} == {"2", "3"}
    # The same files as on a disk: a copy of the bucket is a run directory.
    disk = Checkpoints(server.bucket / "runs" / "pets")
    assert disk.choose() == (3, [])
    jax.tree.map(np.testing.assert_array_equal, disk.state(abstract(make_state()), step=2), make_state(2))


def test_a_torn_upload_is_never_chosen_and_goes(server, run_dir):
    checkpoints = Checkpoints(run_dir)
    save(checkpoints, 3, 6)
    (run_dir / "checkpoints/6/run.json").unlink()
    again = Checkpoints(run_dir)
    assert again.latest_step == 3 and again.choose() == (3, [])
    again.remove_leftovers()
    assert {name.split("/")[1] for name in server.files()} == {"3"}


def test_a_damaged_checkpoint_is_set_aside(server, run_dir):
    save(Checkpoints(run_dir), 3, 6)
    arrays = next((run_dir / "checkpoints/6/state/d").iterdir())
    content = bytearray(arrays.read_bytes())
    content[len(content) // 2] ^= 4
    arrays.write_bytes(content)
    checkpoints = Checkpoints(run_dir)
    step, (line,) = checkpoints.choose(set_aside=True)
    assert step == 3 and "checkpoint 6 is damaged" in line and line.endswith("6.damaged; 3 takes its place")
    assert Checkpoints(run_dir).choose() == (3, [])


def test_without_an_answer_no_older_checkpoint_is_chosen(server, run_dir, few_retries):
    save(Checkpoints(run_dir), 3, 6)
    server.stop()
    with pytest.raises(DataError, match=f"the checkpoints of {run_dir}/checkpoints cannot be read"):
        Checkpoints(run_dir).choose()
    with pytest.raises(DataError, match=f"a checkpoint could not be written to {run_dir}/checkpoints"):
        save(Checkpoints(run_dir), 9)
    server.start()
    assert Checkpoints(run_dir).choose() == (6, [])


TWO_MACHINES = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from pipeline.store.path import run_path
from pipeline.train.checkpoint import Checkpoints
mesh = Mesh(np.array(jax.devices()), ("data",))

def array(values, *axes):
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

for step in (4, 8):
    w = step + np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
    params = {"w": array(w, "data"), "b": array(w[0])}
    checkpoints = Checkpoints(run_path(sys.argv[3]))
    checkpoints.save(step, state={"encoder": {"params": params}}, data={})
    checkpoints.wait()
jax.experimental.multihost_utils.sync_global_devices("end")
"""


@pytest.mark.slow
def test_processes_without_a_shared_disk_save_one_checkpoint(server, strict, run_dir, tmp_path):
    """Each process has a cache folder that the other does not see, where the system lets a test have one."""
    cache = tmp_path / "cache"
    cache.mkdir()
    hide = ["unshare", "--mount", "--map-root-user"]
    if subprocess.run([*hide, "mount", "-t", "tmpfs", "none", str(cache)], capture_output=True).returncode:
        hide = None
    address = free_address()
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    processes = []
    for rank in ("0", "1"):
        command = [sys.executable, "-c", TWO_MACHINES, address, rank, str(run_dir)]
        if hide:
            command = [*hide, "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(cache), *command]
        processes.append(subprocess.Popen(command, env=environment))
    assert [process.wait(250) for process in processes] == [0, 0]

    checkpoints = Checkpoints(run_dir)
    assert checkpoints.steps == [4, 8] and checkpoints.choose() == (8, [])
    assert not [name for name in server.files() if "/parts/" in name]
    for step in (4, 8):
        w = step + np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
        found = checkpoints.state(abstract({"encoder": {"params": {"w": w, "b": w[0]}}}), step=step)
        np.testing.assert_array_equal(found["encoder"]["params"]["w"], w)
        np.testing.assert_array_equal(found["encoder"]["params"]["b"], w[0])
