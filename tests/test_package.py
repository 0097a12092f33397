"""The built wheel away from the clone: a command that answers in any folder, with the recipes in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
# All that a build reads.
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE", "model", "pipeline", "configs")


def test_extras_that_requirements_ask_for_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = [Requirement(line) for lines in [project["dependencies"], *extras.values()] for line in lines]
    for requirement in (r for r in asked if r.extras):
        own = requirement.name == project["name"]
        known = extras.keys() if own else set(metadata(requirement.name).get_all("Provides-Extra"))
        assert requirement.extras <= set(known), requirement
    assert {"demo", "test", "cuda", "tpu"} <= extras.keys()


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the wheel installed into it. Builds from a copy: a build leaves files beside its sources."""
    sources, target = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("installed")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, sources / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", target, sources], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


@pytest.fixture
def imp(installed, tmp_path):
    """Runs the installed command in an empty folder. Returns (exit code, standard output, standard error)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        command = [sys.executable, str(installed / "bin" / "imp"), *arguments]
        environment = os.environ | {"PYTHONPATH": str(installed), "COLUMNS": "100"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        assert not list(tmp_path.iterdir())
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.mark.slow
def test_an_installed_command_answers_in_an_empty_folder(imp):
    golden = ROOT / "tests" / "golden"
    assert imp("pretrain", "--print-config") == (0, (golden / "demo.yaml").read_text(encoding="utf-8"), "")
    code, out, _ = imp("check", "--help")
    assert code == 0 and out.startswith("usage: imp check ") and "python jobs/" not in out
    assert imp("pretrain", "--set", "train.num_stepz=3") == (
        2,
        "",
        "error: unknown key 'train.num_stepz'; did you mean 'train.num_steps'?\n",
    )


@pytest.mark.slow
def test_a_wheel_says_which_distribution_it_is_and_that_it_is_typed(installed, imp):
    (dist_info,) = installed.glob("*.dist-info")
    name, version = re.fullmatch(r"(.+)-(.+)\.dist-info", dist_info.name).groups()
    assert name == "imp_pretrain" and imp("--version") == (0, f"imp {version}\n", "")
    assert (installed / "model/py.typed").exists() and (installed / "pipeline/py.typed").exists()
    recipes = {path.name for path in (installed / "pipeline/configs").iterdir()}
    assert recipes == {path.name for path in (ROOT / "configs").iterdir()}
