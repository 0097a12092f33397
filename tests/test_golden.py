"""Every recipe of configs/, resolved, against its copy in tests/golden/: a change of any value shows in a diff."""

import difflib
import re
from pathlib import Path

import pytest

from pipeline import recipe as recipes
from pipeline.cli import main

ROOT = Path(__file__).resolve().parent.parent
CONFIGS, GOLDEN = ROOT / "configs", ROOT / "tests" / "golden"
MIXTURE = {"text", "data_sets", "tasks", "sampler", "evaluate"}
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


def test_the_recipes_of_the_paper_have_one_mixture():
    """They differ in model, training and machines alone."""
    mixtures = [
        {key: value for key, value in recipes.load(CONFIGS / f"{name}.yaml").to_dict().items() if key in MIXTURE}
        for name in ("imp_b", "imp_b_moe", "imp_l_moe")
    ]
    assert mixtures[0] == mixtures[1] == mixtures[2] and mixtures[0].keys() == MIXTURE


@pytest.mark.parametrize("name", NAMES)
def test_the_header_of_a_recipe_says_what_it_is_and_what_of_it_has_run(name):
    header = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").partition("\n\n")[0]
    said = re.findall(r"^# (\w+): +\S", header, re.MULTILINE)
    assert {"What", "Command"} <= set(said) and {"Run", "Result"} & set(said) and {"Hardware", "Needs"} & set(said)
