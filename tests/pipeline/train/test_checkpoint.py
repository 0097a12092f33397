"""Only whole checkpoints are chosen, what is saved is what the arrays held then, and the disk is looked at before."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.errors import DataError, RequestError
from pipeline.train.checkpoint import Checkpoints

ROOT = Path(__file__).resolve().parents[3]


def make_state(value=1.0, size=1000):
    def params():
        return {"w": jnp.full((size, 50), value), "b": jnp.arange(3.0) + value}

    return {
        name: {"params": params(), "mu": params(), "nu": params(), "count": jnp.int32(value)}
        for name in ("encoder", "head")
    }


def abstract(state):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)


def save(checkpoints, *steps):
    for step in steps:
        checkpoints.save(step, state=make_state(step), data={"seen": step})
    checkpoints.wait()


def value_of(checkpoints, step=None) -> float:
    return float(checkpoints.state(abstract(make_state()), step=step)["head"]["params"]["w"][0, 0])


def test_what_was_saved_comes_back(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step is None
    save(checkpoints, 7)
    again = Checkpoints(tmp_path)
    assert (again.latest_step, again.data()["seen"], again.data()["step"]) == (7, 7, 7)
    found, expected = again.state(abstract(make_state())), make_state(7.0)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert again.data()["groups"]["head"] == {"['b']": [3], "['w']": [1000, 50]}


def test_a_part_of_the_groups_can_be_read(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    assert set(checkpoints.state({"head": abstract(make_state())["head"]})) == {"head"}


def test_a_save_holds_what_the_arrays_held_when_it_was_asked_for(tmp_path):
    """Steps donate their buffers while the save still writes."""
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    checkpoints, state = Checkpoints(tmp_path, keep_last=9), make_state(0.0, size=20_000)
    for number in range(1, 5):
        checkpoints.save(number, state=state, data={})
        for _ in range(10):
            state = step(state)
        jax.block_until_ready(state)
    checkpoints.wait()
    shapes = abstract(make_state(0.0, size=20_000))
    for number in range(1, 5):
        found = checkpoints.state(shapes, step=number)["encoder"]
        assert int(found["count"]) == 10 * (number - 1)
        assert (np.asarray(found["mu"]["w"]) == 10.0 * (number - 1)).all()


def test_the_last_and_every_so_many_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_every=4)
    save(checkpoints, *range(1, 11))
    assert checkpoints.steps == [4, 8, 9, 10]
    assert sorted(int(p.name) for p in checkpoints.folder.iterdir()) == [4, 8, 9, 10]


def damage_missing(folder):
    (folder / "run.json").unlink()


def damage_torn(folder):
    (folder / "run.json").write_text((folder / "run.json").read_text()[:-20])


def damage_truncated(folder):
    largest = max(
        (p for p in folder.rglob("*") if p.is_file() and p.name != "run.json"), key=lambda p: p.stat().st_size
    )
    with open(largest, "r+b") as file:
        file.truncate(largest.stat().st_size // 2)


def damage_gone(folder):
    shutil.rmtree(folder / "state")


def damage_empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def damage_json(folder):
    (folder / "run.json").write_text("[1, 2]")


@pytest.mark.parametrize(
    "damage", [damage_missing, damage_torn, damage_truncated, damage_gone, damage_empty, damage_json]
)
def test_a_checkpoint_that_is_not_whole_is_never_chosen(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 3, 6)
    damage(checkpoints.folder / "6")
    again = Checkpoints(tmp_path)
    assert again.latest_step == 3 and value_of(again) == 3.0
    (line,) = again.faults()
    assert line.startswith("checkpoint 6 is passed over: ")
    # The run comes to that step again, and saves over it.
    save(again, 6)
    assert again.latest_step == 6 and value_of(again) == 6.0 and not again.faults()


def test_other_folders_are_left_alone_and_leftovers_go(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 3)
    for name in ("5.orbax-checkpoint-tmp-12", "notes"):
        (checkpoints.folder / name).mkdir()
    assert checkpoints.latest_step == 3
    checkpoints.remove_leftovers()
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["3", "notes"]


def test_damage_inside_a_file_is_an_error_that_says_what_to_do(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 3)
    for path in (checkpoints.folder / "3" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"\xff" * path.stat().st_size)
    assert checkpoints.latest_step == 3
    with pytest.raises(RequestError, match=r"checkpoint 3 is damaged .* move .*/3 away"):
        value_of(checkpoints)


def test_a_link_out_of_the_run_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 3)
    target = next(p for p in (checkpoints.folder / "3" / "state").rglob("*") if p.is_file())
    outside = tmp_path / "outside"
    shutil.move(target, outside)
    target.symlink_to(outside)
    with pytest.raises(RequestError, match=r"symbolic link|passed over"):
        value_of(checkpoints, step=3)


def test_another_format_is_refused(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 3)
    monkeypatch.setattr("pipeline.train.checkpoint.FORMAT", 99)
    with pytest.raises(RequestError, match="checkpoint 3 has format 2, this version reads 99"):
        checkpoints.data()


def test_a_full_disk_is_seen_before_the_save(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 3)
    usage = shutil.disk_usage(tmp_path)._replace(free=20 << 20)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(DataError, match=r"needs 34\.8 MB, .* has 21\.0 MB free; .* newest whole checkpoint is 3"):
        checkpoints.save(4, state=make_state(4, size=1000), data={})
    assert checkpoints.latest_step == 3


FULL = """
import resource, sys
from pathlib import Path
import jax
from pipeline.errors import DataError
from pipeline.train.checkpoint import Checkpoints

def state(size):
    params = {"w": jax.random.normal(jax.random.key(size), (size, 1000))}
    return {"encoder": {"params": params, "mu": params, "nu": params}}

checkpoints = Checkpoints(Path(sys.argv[1]))
checkpoints.save(3, state=state(2), data={})
checkpoints.wait()
# From now on no file may grow beyond 64 kB: the next save fails in the background, as on a disk that fills up.
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
checkpoints.save(4, state=state(500), data={})
try:
    checkpoints.wait()
except DataError as e:
    print(e)
print("newest", Checkpoints(Path(sys.argv[1])).latest_step)
"""


def test_a_save_that_fails_in_the_background_is_reported(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    error, newest = done.stdout.splitlines()
    assert error.startswith(f"a checkpoint could not be written to {tmp_path}/checkpoints: "), done.stderr
    assert error.endswith("The newest whole checkpoint is 3") and newest == "newest 3"


KILLED = """
import sys
from pathlib import Path
import jax.numpy as jnp
from pipeline.train.checkpoint import Checkpoints

checkpoints = Checkpoints(Path(sys.argv[1]), keep_last=2)
step = (checkpoints.latest_step or 0) + 1
print("going", flush=True)
while True:
    params = {"w": jnp.full((3000, 500), float(step))}
    state = {"encoder": {"params": params, "mu": params, "nu": params, "count": jnp.int32(step)}}
    checkpoints.save(step, state=state, data={"seen": step})
    step += 1
"""


@pytest.mark.slow
def test_kills_in_the_middle_of_saves_leave_whole_checkpoints(tmp_path):
    """kill -9 at 5 moments of a process that does nothing but save."""
    last = 0
    for number in range(5):
        command = [sys.executable, "-c", KILLED, str(tmp_path)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        assert process.stdout.readline() == b"going\n"
        time.sleep(0.6 + 0.059 * number)
        process.send_signal(signal.SIGKILL)
        process.wait()
        checkpoints = Checkpoints(tmp_path)
        step = checkpoints.latest_step
        assert step > last
        last = step
        shape = jax.ShapeDtypeStruct(
            (3000, 500), jnp.float32, sharding=abstract(make_state())["head"]["count"].sharding
        )
        for whole in checkpoints.steps:
            found = checkpoints.state({"encoder": {"params": {"w": shape}}}, step=whole)["encoder"]["params"]["w"]
            assert (np.asarray(found) == whole).all() and checkpoints.data(whole)["seen"] == whole
