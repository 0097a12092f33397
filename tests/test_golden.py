"""Every recipe of configs/, resolved, against its copy in tests/golden/: a change of any value shows in a diff."""

import difflib
from pathlib import Path

import pytest

from pipeline import recipe as recipes
from pipeline.cli import main

ROOT = Path(__file__).resolve().parent.parent
CONFIGS, GOLDEN = ROOT / "configs", ROOT / "tests" / "golden"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def rewrite(name: str) -> str:
    return f"python jobs/pretrain.py --config configs/{name}.yaml --print-config > tests/golden/{name}.yaml"


def test_every_recipe_has_its_golden_file_and_no_other():
    stored = sorted(path.stem for path in GOLDEN.glob("*.yaml"))
    assert stored == NAMES, "\n".join(map(rewrite, NAMES))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_resolves_to_its_golden_file(name, capsys, monkeypatch, tmp_path):
    """As --print-config prints it, from another folder and without the demo corpus."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IMP_CACHE", str(tmp_path))
    assert main(["pretrain", "--config", str(CONFIGS / f"{name}.yaml"), "--print-config"]) == 0
    found, golden = capsys.readouterr().out, (GOLDEN / f"{name}.yaml").read_text(encoding="utf-8")
    lines = difflib.unified_diff(golden.splitlines(), found.splitlines(), "golden", "resolved now", lineterm="", n=1)
    diff = "\n".join(lines)
    assert not diff, f"{name} resolves to something else; where that is meant:\n{rewrite(name)}\n{diff}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_file_is_a_recipe_and_resolves_to_itself(name):
    text = (GOLDEN / f"{name}.yaml").read_text(encoding="utf-8")
    recipe = recipes.load(GOLDEN / f"{name}.yaml")
    assert recipes.dump(recipe.to_dict()) == text
    assert recipe == recipes.load(CONFIGS / f"{name}.yaml")
