"""What --help of each job says: short, with examples that the job takes."""

import errno
import os
import re
import shlex

import pytest

from pipeline import cli
from pipeline.recipe.resume import _FREE

JOBS = ("pretrain", "preprocess", "check", "evaluate", "export")


@pytest.fixture
def help_of(capsys, monkeypatch):
    def read(job: str) -> str:
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as caught:
            getattr(cli, f"{job}_main")(["--help"])
        assert caught.value.code == 0
        return capsys.readouterr().out

    return read


@pytest.mark.parametrize("job", JOBS)
def test_help_fits_on_a_screen_and_says_the_exit_codes(help_of, job):
    lines = help_of(job).splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 120
    assert lines[-1].startswith("exit codes: 0 ")


@pytest.mark.parametrize("job", JOBS)
def test_examples_of_a_help_use_options_that_there_are(help_of, job):
    examples = re.findall(r"^  python jobs/(\w+)\.py(.*)", help_of(job), re.MULTILINE)
    assert examples
    for name, arguments in examples:
        known = help_of(name).partition("\nexamples:")[0]
        for option in (word for word in shlex.split(arguments) if word.startswith("--")):
            assert option in known, option


def test_help_of_pretrain_says_what_a_resume_may_change_and_where_the_keys_are(help_of):
    text = help_of("pretrain")
    assert all(f"{part}." in text for part in _FREE)
    assert "train.num_steps" in text and "--print-config    every key of a recipe" in text


def test_a_full_disk_is_one_line_and_any_other_fault_of_the_system_a_traceback(capsys):
    def fails(number):
        def job(arguments, stop):
            raise OSError(number, os.strerror(number), "runs/demo/summary.json")

        return cli.run_job(job, None)

    for number in (errno.ENOSPC, errno.EROFS, errno.EFBIG, errno.EDQUOT):
        assert fails(number) == 1
        (line,) = capsys.readouterr().err.splitlines()
        said = f"[Errno {number}] {os.strerror(number)}: 'runs/demo/summary.json'"
        assert line == f"failed: {said}; free some space or mend the storage, and run the same command again"
    with pytest.raises(PermissionError):
        fails(errno.EACCES)
