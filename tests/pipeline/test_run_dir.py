"""The run directory: one process, one recipe, whatever a kill left behind."""

import contextlib
import errno
import os
import shutil
import threading
import time

import pytest
import yaml

from pipeline import run_lock
from pipeline.errors import RequestError
from pipeline.plan import plan
from pipeline.run_dir import check_run_dir, claim, lock_run_dir
from pipeline.train.attempts import RankAttempt


def claimed(recipe, run_dir):
    spec = plan(recipe, run_dir)
    claim(run_dir, spec)
    return spec


def test_claiming_fills_the_run_directory(tmp_path, make_pet_recipe):
    run_dir, recipe = tmp_path / "run", make_pet_recipe()
    spec = claimed(recipe, run_dir)
    assert sorted(p.name for p in run_dir.iterdir()) == ["config.yaml", "tokenizer.model"]
    assert yaml.safe_load((run_dir / "config.yaml").read_text()) == recipe.to_dict()
    assert (run_dir / "tokenizer.model").read_bytes() == spec.data.tokenizer


def test_claiming_again_changes_nothing(tmp_path, make_pet_recipe):
    run_dir = tmp_path / "run"
    first = claimed(make_pet_recipe(), run_dir)
    check_run_dir(make_pet_recipe(), run_dir)
    assert claimed(make_pet_recipe(), run_dir) == first


def test_a_run_directory_may_be_absent_or_empty(tmp_path, make_pet_recipe):
    check_run_dir(make_pet_recipe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    check_run_dir(make_pet_recipe(), tmp_path / "run")


def test_a_path_that_can_hold_no_checkpoint_is_refused_first(tmp_path, make_pet_recipe):
    with pytest.raises(RequestError, match=r"lr\[1\]/run: expected a path without \[ \], where checkpoints cannot"):
        check_run_dir(make_pet_recipe(), tmp_path / "lr[1]/run")


def test_a_folder_of_something_else_is_refused(tmp_path, make_pet_recipe):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RequestError, match="expected a run directory or an empty one, found other files"):
        check_run_dir(make_pet_recipe(), tmp_path)


def test_a_run_of_another_recipe_is_refused(tmp_path, make_pet_recipe):
    claimed(make_pet_recipe(), tmp_path / "run")
    check_run_dir(make_pet_recipe(train={"num_steps": 20}), tmp_path / "run")
    with pytest.raises(RequestError, match="made with seed = 0, the recipe now says 1"):
        check_run_dir(make_pet_recipe(seed=1), tmp_path / "run")


@pytest.mark.parametrize("rest", ["nothing", "a link to nowhere", "an interrupted copy"])
def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(tmp_path, make_pet_recipe, rest):
    """A disk that is not mounted, a copy without all files: the next command would cut the log back to nothing."""
    run_dir, recipe = tmp_path / "run", make_pet_recipe()
    claimed(recipe, run_dir)
    attempt = RankAttempt(run_dir, rank=0, start_step=0, facts={})
    attempt.step(recipe.train.checkpoint_every, {})
    check_run_dir(recipe, run_dir)
    RankAttempt(run_dir, rank=0, start_step=3, facts={})
    if rest == "a link to nowhere":
        (run_dir / "checkpoints").symlink_to(tmp_path / "unmounted")
    elif rest == "an interrupted copy":
        (run_dir / "checkpoints/3/state").mkdir(parents=True)
    why = r"checkpoints holds no whole checkpoint"
    why += r" \(checkpoint 3 is skipped: run.json is missing\)" if rest == "an interrupted copy" else ""
    with pytest.raises(RequestError, match=f"its step 3 was saved, and .*{why}; put"):
        check_run_dir(recipe, run_dir)


def test_another_layout_of_parameters_is_the_same_run(tmp_path, make_pet_recipe):
    claimed(make_pet_recipe(cluster={"expert_parallel": 2, "fsdp": True}), tmp_path / "run")
    assert check_run_dir(make_pet_recipe(), tmp_path / "run") == []


def test_a_refused_model_leaves_the_run_directory_free(tmp_path, make_pet_recipe):
    """The user mends the recipe and runs the same command again."""
    with pytest.raises(RequestError, match="dense"):
        claimed(make_pet_recipe(model={"variant": "imp-s", "moe": {"num_experts": 4}}), tmp_path / "run")
    check_run_dir(make_pet_recipe(), tmp_path / "run")
    claimed(make_pet_recipe(), tmp_path / "run")


def test_a_kill_before_the_config_is_written_leaves_the_run_directory_free(tmp_path, make_pet_recipe):
    """A first start may die at any moment; what it has left is no other files."""
    claimed(make_pet_recipe(), tmp_path / "run")
    (tmp_path / "run" / "config.yaml").unlink()
    check_run_dir(make_pet_recipe(), tmp_path / "run")


def test_a_config_that_was_not_written_to_its_end_is_one_clear_line(tmp_path, make_pet_recipe):
    claimed(make_pet_recipe(), tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(RequestError):
        check_run_dir(make_pet_recipe(), tmp_path / "run")


def test_two_processes_cannot_share_a_run_directory(tmp_path):
    lock = lock_run_dir(tmp_path / "run")
    with pytest.raises(RequestError, match="another process is training there"):
        lock_run_dir(tmp_path / "run")
    lock.close()
    lock_run_dir(tmp_path / "run").close()


@pytest.fixture
def locked(tmp_path, monkeypatch):
    """A lock whose folder is looked at all the time, and what it does when that is lost."""
    monkeypatch.setattr(run_lock, "_LOOK_S", 0.001)
    lost = threading.Event()
    (tmp_path / "run").mkdir()
    with contextlib.closing(run_lock.FolderLock(tmp_path / "run/.lock", lost=lost.set)):
        yield tmp_path / "run", lost


@pytest.mark.parametrize("after", [lambda run: None, lambda run: run.mkdir(), lambda run: run.touch()])
def test_a_run_whose_folder_is_moved_or_exchanged_ends(locked, after):
    run, lost = locked
    run.rename(run.with_name("moved"))
    after(run)
    assert lost.wait(200)


def test_a_run_whose_folder_was_deleted_and_made_again_by_a_checkpoint_ends(locked):
    run, lost = locked
    shutil.rmtree(run)
    (run / "checkpoints").mkdir(parents=True)
    assert lost.wait(200)


def test_a_folder_that_is_there_or_does_not_answer_for_a_while_is_not_lost(locked, monkeypatch):
    run, lost = locked
    (run / ".lock").unlink()
    looks, stat = [], os.stat

    def unreachable(path, **options):
        if str(path) != str(run):
            return stat(path, **options)
        looks.append(path)
        # Storage out of reach, and for two looks without the folder.
        number = errno.EIO if len(looks) < 20 else errno.ENOENT
        if len(looks) < 22:
            raise OSError(number, os.strerror(number))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", unreachable)
    while len(looks) < 40:
        time.sleep(0.001)
    assert not lost.is_set()


def test_storage_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def flock(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(run_lock.fcntl, "flock", flock)
    lock_run_dir(tmp_path / "run").close()
    said = f"warning: the storage of {tmp_path / 'run'} has no locks: a second run there would not be refused\n"
    assert capsys.readouterr().err == said
