"""A command that runs as a submitted job: what it writes outlives the job, and a stop leaves it time to save."""

import json
import logging
import zipfile
from pathlib import Path

import pytest

from pipeline import cli, ray_job
from pipeline.errors import RequestError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def in_job(monkeypatch, tmp_path):
    """A job whose upload Ray has unpacked in the current folder. Returns that folder."""
    upload = tmp_path / "_ray_pkg_0123"
    upload.mkdir()
    monkeypatch.chdir(upload)
    config = {"runtime_env": {"working_dir": "gcs://_ray_pkg_0123.zip"}, "metadata": {"job_submission_id": "job"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(config))
    monkeypatch.delenv("RAY_JOB_STOP_WAIT_TIME_S", raising=False)
    return upload


def test_a_folder_that_goes_with_the_job_is_refused(in_job, tmp_path):
    with pytest.raises(RequestError, match="--run-dir runs/demo, a relative path: expected a folder that outlives"):
        ray_job.check_outlives(Path("runs/demo"), "--run-dir")
    with pytest.raises(RequestError, match=r"--out .*pkg_0123/shards: .*absolute path .* --out /mnt/runs/shards"):
        ray_job.check_outlives(in_job / "shards", "--out")
    link = tmp_path / "link"
    link.symlink_to(in_job)
    with pytest.raises(RequestError, match="outlives"):
        ray_job.check_outlives(link / "demo", "--run-dir")


def test_folders_that_stay_are_taken(in_job, monkeypatch, tmp_path):
    for stays in (tmp_path / "runs/demo", Path("~/runs"), "s3://bucket/demo", Path("gs://bucket/demo")):
        ray_job.check_outlives(stays, "--run-dir")
    # Without an upload the job's folder is one of its image.
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {}, "metadata": {}}))
    ray_job.check_outlives(in_job / "runs", "--run-dir")
    with pytest.raises(RequestError, match="a relative path"):
        ray_job.check_outlives("runs/demo", "--run-dir")
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    ray_job.check_outlives("runs/demo", "--run-dir")
    assert ray_job.grace_warning() is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["pretrain"],
        ["pretrain", "--run-dir", "here"],
        ["preprocess", "--config", "demo", "--out", "here"],
        ["import", "folders", ".", "--out", "here/train.parquet"],
    ],
)
def test_every_command_that_writes_says_so_in_a_line(in_job, capsys, arguments):
    assert cli.main(arguments) == 2
    assert list(in_job.iterdir()) == []
    (line,) = capsys.readouterr().err.splitlines()
    assert "expected a folder that outlives this job" in line


@pytest.mark.parametrize(("seconds", "warned"), [(None, 3), ("3", 3), ("29", 29), ("30", None), ("soon", 3)])
def test_a_short_grace_is_announced(in_job, monkeypatch, seconds, warned):
    if seconds is not None:
        monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", seconds)
    line = ray_job.grace_warning()
    assert line is None if warned is None else f"kills this run {warned} s after" in line and "deploy/job.yaml" in line


def test_an_upload_holds_the_code_and_no_data(tmp_path):
    """As Ray packs it, by the clone's own .gitignore and .rayignore."""
    from ray._private.runtime_env.packaging import create_package

    clone, sent = tmp_path / "clone", ["jobs/pretrain.py", "pipeline/data/order.py", "configs/mine.yaml", "mine/own.py"]
    kept = [".git/config", "data/train.parquet", "runs/demo/metrics.jsonl", ".venv/bin/python", "wandb/run/x"]
    kept += ["pipeline/__pycache__/order.pyc", ".pytest_cache/x", "tests/x.py", "docs/x.md", "shards/x.arrow"]
    for name in sent + kept:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text("x")
    for name in (".gitignore", ".rayignore"):
        (clone / name).write_text((ROOT / name).read_text())
    package = tmp_path / "package.zip"
    create_package(str(clone), package, include_gitignore=True, logger=logging.getLogger("test"))
    names = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}
    assert names - {".gitignore", ".rayignore"} == set(sent)
