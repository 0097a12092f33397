"""Only whole checkpoints are chosen, what is saved is what the arrays held then, and the disk is looked at before."""

import errno
import os
import re
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


def test_a_save_looks_at_no_old_checkpoint_that_stays_in_any_case(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_every=2)
    save(checkpoints, 2, 4, 6, 7)
    looked_at, fault = set(), Checkpoints._fault
    monkeypatch.setattr(Checkpoints, "_fault", lambda self, step, **kw: looked_at.add(step) or fault(self, step, **kw))
    save(checkpoints, 8)
    assert looked_at == {7, 8} and checkpoints.steps == [2, 4, 6, 7, 8]


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
    assert line.startswith("checkpoint 6 is skipped: ")
    # The run comes to that step again, and saves over it.
    save(again, 6)
    assert again.latest_step == 6 and value_of(again) == 6.0 and not again.faults()


# --- damage: files that are there, but are not what was written ---


def flip(path, *, at=0.5):
    """Flips one bit of a file."""
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def arrays(folder):
    """A file of a checkpoint that holds arrays."""
    return next((folder / "state" / "d").iterdir())


def flipped_array(folder):
    flip(arrays(folder))


def flipped_step(folder):
    text = (folder / "run.json").read_text()
    (folder / "run.json").write_text(text.replace('"seen": 6', '"seen": 4'))


def flipped_format(folder):
    text = (folder / "run.json").read_text()
    (folder / "run.json").write_text(text.replace('"format": 3', '"format": 2'))


def flipped_digest(folder):
    flip(folder / "run.json", at=0.999)


def empty_run(folder):
    (folder / "run.json").write_bytes(b"")


def run_of_another_step(folder):
    shutil.copy(folder.parent / "3" / "run.json", folder / "run.json")


def arrays_of_another_step(folder):
    shutil.rmtree(folder / "state")
    shutil.copytree(folder.parent / "3" / "state", folder / "state")


def one_file_more(folder):
    shutil.copy(arrays(folder), folder / "state" / "d" / "more")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run directory with checkpoints of the steps 3 and 6."""
    run_dir = tmp_path_factory.mktemp("saved")
    save(Checkpoints(run_dir), 3, 6)
    return run_dir


@pytest.fixture
def run_dir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flipped_array, r"state/d/\w+ is corrupt \(checksum mismatch\)"),
        (flipped_step, r"run\.json cannot be read: checksum mismatch"),
        (flipped_format, r"run\.json cannot be read: checksum mismatch"),
        (flipped_digest, r"run\.json cannot be read: checksum mismatch"),
        (empty_run, r"run\.json cannot be read: Expecting value: line 1 column 1 \(char 0\)"),
        (run_of_another_step, r"run\.json is that of step 3"),
        (arrays_of_another_step, r"state/.* (is missing|is corrupt|bytes were written)"),
        (one_file_more, r"state/d/more does not belong to it"),
        (damage_truncated, r"state/\S+ has \d+ bytes, \d+ were written"),
        (damage_gone, r"state/\S+ is missing"),
        (damage_json, r"run\.json cannot be read: expected a JSON object, found list"),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_takes_its_place(run_dir, damage, said):
    checkpoints = Checkpoints(run_dir, keep_last=2)
    damage(checkpoints.folder / "6")
    # Who only reads leaves it where it is.
    step, (line,) = checkpoints.choose()
    assert step == 3 and re.fullmatch(rf"checkpoint 6 is damaged \({said}\); 3 takes its place", line)
    step, (line,) = checkpoints.choose(set_aside=True)
    aside = checkpoints.folder / "6.damaged"
    assert step == 3 and line.endswith(f", is set aside as {aside}; 3 takes its place")
    assert checkpoints.choose(set_aside=True) == (3, []) and checkpoints.steps == [3] and value_of(checkpoints) == 3.0
    # It neither counts nor goes when others are saved, at its step again or later.
    save(checkpoints, 6)
    flip(arrays(checkpoints.folder / "6"))
    checkpoints.choose(set_aside=True)
    save(checkpoints, 9)
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["3", "6.damaged", "6.damaged-2", "9"]


def test_one_bit_of_any_file_is_found(run_dir):
    """At its beginning, its middle and its end; without it the checkpoint is sound again."""
    checkpoints = Checkpoints(run_dir)
    files = [p for p in (checkpoints.folder / "6").rglob("*") if p.is_file() and p.stat().st_size]
    assert len(files) > 8
    for path in files:
        for at in (0, 0.5, 1):
            flip(path, at=at)
            step, (line,) = checkpoints.choose()
            assert step == 3 and f"({path.relative_to(checkpoints.folder / '6')} " in line
            flip(path, at=at)
    assert checkpoints.choose() == (6, [])


def test_a_run_whose_checkpoints_are_all_damaged_never_begins_anew_by_itself(run_dir):
    checkpoints = Checkpoints(run_dir)
    for step in ("3", "6"):
        flip(arrays(checkpoints.folder / step))
    for _ in range(2):
        with pytest.raises(DataError, match=r"every checkpoint in .* is damaged, the newest, 6, because state/.*anew"):
            checkpoints.choose(set_aside=True)


@pytest.mark.parametrize("denied", ["iterdir", "read_bytes", "lstat"])
@pytest.mark.parametrize("fault", [errno.EACCES, errno.ESTALE])
def test_without_an_answer_of_a_disk_no_older_checkpoint_is_chosen(run_dir, monkeypatch, denied, fault):
    """Permissions, a mount that is gone: of the folder, of run.json, of the arrays."""
    checkpoints, real = Checkpoints(run_dir), getattr(Path, denied)

    def refuse(path):
        if denied == "iterdir" or path.is_relative_to(checkpoints.folder / "6"):
            raise OSError(fault, os.strerror(fault), str(path))
        return real(path)

    monkeypatch.setattr(Path, denied, refuse)
    for look in (lambda: checkpoints.latest_step, lambda: checkpoints.choose(set_aside=True), checkpoints.faults):
        with pytest.raises(DataError, match=r"cannot be read: .*; mend the storage or its permissions, and run the"):
            look()
    monkeypatch.undo()
    assert checkpoints.choose() == (6, [])


@pytest.mark.parametrize("name", ["ü # %41 x:y|z {a}", "lr[12]", "a*", "a?", "a\\b"])
def test_a_path_whose_checkpoints_could_not_be_read_again_is_refused(tmp_path, name):
    checkpoints = Checkpoints(tmp_path / name)
    if name.startswith("ü"):
        save(checkpoints, 3)
        assert value_of(Checkpoints(tmp_path / name)) == 3.0
        return
    with pytest.raises(RequestError, match=r"expected a path without .*, where checkpoints cannot be kept; rename it"):
        save(checkpoints, 3)
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_was_cut_short_is_no_damage(run_dir):
    checkpoints = Checkpoints(run_dir)
    (checkpoints.folder / "6" / "run.json").unlink()
    assert checkpoints.choose(set_aside=True) == (3, [])
    (checkpoints.folder / "3" / "run.json").unlink()
    assert checkpoints.choose(set_aside=True) == (None, [])


def test_good_checkpoints_stay_while_updates_are_not_finite(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    save(checkpoints, 1, 2, 3)
    for step in (4, 5, 6):
        checkpoints.save(step, state=make_state(step), data={}, finite=False)
    checkpoints.wait()
    # The newest is what the run goes on from.
    assert checkpoints.steps == [2, 3, 6] and checkpoints.last_finite_step() == 3
    save(checkpoints, 7)
    assert checkpoints.steps == [3, 7]
    # A state that holds a NaN is none to keep, whatever the updates were.
    state = make_state(8.0)
    state["head"]["params"]["w"] = state["head"]["params"]["w"].at[5, 5].set(jnp.nan)
    checkpoints.save(8, state=state, data={})
    checkpoints.wait()
    assert checkpoints.steps == [3, 7, 8] and checkpoints.last_finite_step() == 7
    save(checkpoints, 9)
    assert checkpoints.steps == [7, 9]


def test_without_a_good_checkpoint_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in (1, 2, 3):
        checkpoints.save(step, state=make_state(step), data={}, finite=False)
    checkpoints.wait()
    assert checkpoints.steps == [2, 3] and checkpoints.last_finite_step() is None


def test_arrays_of_another_form_are_refused(run_dir):
    shape = abstract(make_state(size=999))
    with pytest.raises(RequestError, match=r"checkpoint 6 is damaged"):
        Checkpoints(run_dir).state(shape)


def test_a_folder_that_cannot_be_made_is_a_fault_of_the_storage(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(DataError, match=r"checkpoints cannot be written to .*File exists"):
        Checkpoints(tmp_path).save(1, state=make_state(), data={})


def test_no_process_begins_a_save_that_another_cannot_make(tmp_path, monkeypatch):
    """Four processes: the third has no room. All of them say so, whose disk it is or not."""
    lines = []

    def gathered(line):
        lines.append(line)
        others = np.zeros((4, len(line)), np.uint8)
        others[2, :8] = np.frombuffer("voll: ü!".encode()[:8], np.uint8)
        return others

    monkeypatch.setattr("jax.process_count", lambda: 4)
    monkeypatch.setattr("pipeline.train.agreement.multihost_utils.process_allgather", gathered)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(DataError, match=r"^voll: ü$"):
        checkpoints.save(1, state=make_state(), data={})
    monkeypatch.setattr(checkpoints, "wait", lambda: (_ for _ in ()).throw(DataError("é" * 2000)))
    with pytest.raises(DataError, match=r"^voll: ü$"):
        checkpoints.save(1, state=make_state(), data={})
    assert not lines[0].any() and bytes(lines[1]).decode() == "é" * 512
    assert not list(checkpoints.folder.iterdir())


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
    with pytest.raises(RequestError, match=r"symbolic link|skipped"):
        value_of(checkpoints, step=3)


def test_another_format_is_refused(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 3)
    monkeypatch.setattr("pipeline.train.checkpoint_folder.FORMAT", 99)
    with pytest.raises(RequestError, match="checkpoint 3 has format 3, this version reads 99"):
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
        timeout=200,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    error, newest = done.stdout.splitlines()
    assert error.startswith(f"a checkpoint could not be written to {tmp_path}/checkpoints: "), done.stderr
    assert error.endswith("The newest whole checkpoint is 3") and newest == "newest 3"
    assert "Traceback" not in done.stderr, done.stderr


KILLED = """
import sys
from pathlib import Path
import jax.numpy as jnp
from pipeline.train.checkpoint import Checkpoints

checkpoints = Checkpoints(Path(sys.argv[1]), keep_last=2)
step = (checkpoints.latest_step or 0) + 1
while True:
    params = {"w": jnp.full((3000, 500), float(step))}
    state = {"encoder": {"params": params, "mu": params, "nu": params, "count": jnp.int32(step)}}
    checkpoints.save(step, state=state, data={"seen": step})
    print("saving", step, flush=True)
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
        # A save begins once the one before it is whole: after the second line there is a new checkpoint.
        assert all(process.stdout.readline().startswith(b"saving") for _ in range(2))
        time.sleep(0.059 * number)
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
