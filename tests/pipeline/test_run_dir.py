"""The run directory: one process, one recipe, whatever a kill left behind."""

import pytest
import yaml

from pipeline.errors import RequestError
from pipeline.plan import plan
from pipeline.run_dir import check_run_dir, claim, lock_run_dir


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


def test_a_folder_of_something_else_is_refused(tmp_path, make_pet_recipe):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RequestError, match="expected a run directory or an empty one, found other files"):
        check_run_dir(make_pet_recipe(), tmp_path)


def test_a_run_of_another_recipe_is_refused(tmp_path, make_pet_recipe):
    claimed(make_pet_recipe(), tmp_path / "run")
    check_run_dir(make_pet_recipe(train={"num_steps": 20}), tmp_path / "run")
    with pytest.raises(RequestError, match="made with seed = 0, the recipe now says 1"):
        check_run_dir(make_pet_recipe(seed=1), tmp_path / "run")


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
