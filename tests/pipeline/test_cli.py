"""The command ``imp``: its groups, and what --help of each command says, with examples that the command takes."""

import errno
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.commands import command, typed_command
from pipeline.recipe.resume import _FREE

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [name for name in cli.COMMANDS if name != "import"]


@pytest.fixture
def help_of(capsys, monkeypatch):
    def read(name: str) -> str:
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as caught:
            cli.main([name, "--help"])
        assert caught.value.code == 0
        return capsys.readouterr().out

    return read


def test_help_lists_every_command_in_its_group(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert cli.main([]) == 0 and capsys.readouterr().out == out
    groups = re.findall(r"^(\w+):\n((?:  .+\n)+)", out, re.MULTILINE)
    listed = {(group, line.split()[0]) for group, lines in groups for line in lines.splitlines()}
    assert listed == {(c.group, name) for name, c in cli.COMMANDS.items()}


def test_a_command_that_is_misspelt_is_one_line_and_exit_2(capsys):
    assert cli.main(["pretrian"]) == cli.main(["frobnicate"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: imp pretrian: no such command; did you mean pretrain?",
        "error: imp frobnicate: no such command; imp --help lists the commands",
    ]


@pytest.mark.parametrize(
    ("arguments", "unused"),
    [
        (["--help"], ["numpy", "yaml", "pydantic", "jax", "ray"]),
        (["check", "--help"], ["numpy", "yaml", "pydantic", "jax", "ray"]),
        (["pretrain", "--set", "train.num_stepz=3"], ["ray", "orbax"]),
        (["check", "--config", "demo", "--set", "train.num_stepz=3"], ["ray", "orbax"]),
        (["preprocess", "--config", "demo", "--out", "x", "--set", "train.num_stepz=3"], ["ray", "orbax"]),
    ],
)
def test_help_and_an_error_in_a_recipe_load_no_library_of_the_run(arguments, unused):
    code = f"""
import sys
from pipeline.cli import main
try:
    main({arguments!r})
except SystemExit:
    pass
print("loaded:", *sorted(set({unused!r}) & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, timeout=200
    )
    assert done.stdout.splitlines()[-1] == "loaded:"
    assert "did you mean 'train.num_steps'" in done.stderr if "--set" in arguments else not done.stderr


@pytest.mark.parametrize(
    ("program", "named"),
    [
        ("/usr/bin/imp", "imp preprocess"),
        ("jobs/check.py", "python jobs/preprocess.py"),
        ("/home/me/imp/jobs/check.py", "python /home/me/imp/jobs/preprocess.py"),
        # A process of Ray in a clone.
        ("default_worker.py", "python jobs/preprocess.py"),
    ],
)
def test_messages_name_commands_as_the_program_was_started(monkeypatch, program, named):
    monkeypatch.setattr("sys.argv", [program])
    assert command("preprocess") == named
    assert command("import") == (named.replace("preprocess", "import") if "imp " in named else f"{named} import")


def test_an_installed_package_without_jobs_names_the_installed_command(monkeypatch, tmp_path):
    monkeypatch.setattr("pipeline.commands._JOBS", tmp_path / "jobs")
    assert command("check") == "imp check"


def test_the_command_to_go_on_with_is_what_was_typed(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/venv/bin/imp", "pretrain", "--run-dir", "my runs"])
    assert typed_command() == "imp pretrain --run-dir 'my runs'"
    monkeypatch.setattr("sys.argv", ["../jobs/pretrain.py", "--set", "seed=1"])
    assert typed_command() == "python ../jobs/pretrain.py --set seed=1"


def test_the_scripts_of_jobs_are_the_commands():
    scripts = {path.stem: path.read_text() for path in (ROOT / "jobs").glob("*.py")}
    assert set(scripts) == set(COMMANDS)
    assert all(f'main(["{name}", *sys.argv[1:]])' in text for name, text in scripts.items())


def test_a_recipe_is_a_file_or_the_name_of_one_that_comes_along(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["pretrain", "--config", "demo", "--print-config"]) == 0
    by_name = capsys.readouterr().out
    assert cli.main(["pretrain", "--config", str(ROOT / "configs/demo.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == by_name
    # A file of that name comes first.
    Path("demo").write_text("seed: 1\n")
    assert cli.main(["pretrain", "--config", "demo"]) == 2
    assert "missing key" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "--config", "demoo"])
    assert "found demoo; did you mean demo?" in capsys.readouterr().err
    assert cli.main(["pretrain", "--config", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == "error: --config nowhere.yaml: no such file\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_on_a_screen_and_says_the_exit_codes(help_of, name):
    lines = help_of(name).splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 120
    assert lines[-1].startswith("exit codes: 0 ")


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_a_help_use_known_options(help_of, name):
    examples = re.findall(r"^  python jobs/(\w+)\.py(.*)", help_of(name), re.MULTILINE)
    assert examples
    for other, arguments in examples:
        known = help_of(other).partition("\nexamples:")[0]
        for option in (word for word in shlex.split(arguments) if word.startswith("--")):
            assert option in known, option


def test_examples_name_the_installed_command_where_it_runs(help_of, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/imp"])
    for name in COMMANDS:
        assert "python" not in help_of(name) and f"  imp {name} --" in help_of(name)


def test_help_of_pretrain_says_what_a_resume_may_change_and_where_the_keys_are(help_of):
    text = help_of("pretrain")
    assert all(f"{part}." in text for part in _FREE)
    assert "train.num_steps" in text and "--print-config    every key of a recipe" in text


@pytest.mark.parametrize(
    ("numbers", "remedy"),
    [
        ((errno.ENOSPC, errno.EROFS, errno.EFBIG, errno.EDQUOT), "free some space or mend the storage"),
        ((errno.EACCES, errno.EPERM, errno.ESTALE, errno.EIO), "mend the storage or its permissions"),
        ((errno.ENAMETOOLONG,), "name a shorter path"),
    ],
)
def test_a_fault_of_the_storage_is_one_line_and_any_other_of_the_system_a_traceback(capsys, numbers, remedy):
    def fails(number, *file):
        def job(arguments, stop):
            raise OSError(number, os.strerror(number), *file)

        return cli.run_job(job, None)

    for number in numbers:
        assert fails(number, "runs/demo/summary.json") == 1
        (line,) = capsys.readouterr().err.splitlines()
        said = f"[Errno {number}] {os.strerror(number)}: 'runs/demo/summary.json'"
        assert line == f"failed: {said}; {remedy}, and run the same command again"
    with pytest.raises(FileNotFoundError):
        fails(errno.ENOENT, "runs/demo/summary.json")
    with pytest.raises(PermissionError):
        fails(errno.EPERM)
